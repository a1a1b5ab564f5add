"""Model families, one file each: how to load a denoiser, feed it, and sample with it."""
