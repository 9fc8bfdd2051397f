"""The same weights laid out in other tensors: fused, packed, turned round, cut out, one by one."""
