"""Video backbones; each file ends with the name map of its published weights."""
