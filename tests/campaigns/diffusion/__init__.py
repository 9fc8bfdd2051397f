"""Diffusion models: what diffusers calls their modules, and what it makes of LoRA files beside what continual does."""
