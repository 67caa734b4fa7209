"""Speed of xloom beside the base model and PEFT's X-LoRA, the same weights in every system."""
