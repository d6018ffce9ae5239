"""A web page that finds the actions in a visitor's video: `python -m vad_jax.demo`."""
