"""LoRA files of trainers other than PEFT: one safetensors file without an adapter_config.json, as sd-scripts (Kohya),
LyCORIS, diffusers, ai-toolkit, diffusion-pipe and OneTrainer write it.

`parsing` says which tensors of a file belong together, `releases` how the original releases of diffusion models name
their modules, `targets` which weight of a base a module's name means, `file` makes an adapter of it all, and
`architecture` compares what a file says of its base.
"""
