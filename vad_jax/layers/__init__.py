"""Parts shared by two or more systems."""
