"""What a training is told: `base` has every key, the others override what differs."""
