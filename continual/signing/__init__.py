"""Signatures of models, by OpenSSF's `model-signing` (the extra `signing`): who signed what, and signing what goes out.
Which files a model has and what they hash to is found here; the library signs and verifies that."""
