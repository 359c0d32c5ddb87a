"""What the models trained here share: their shape, masks, teacher-forced decode, export. Never imports sglang."""
