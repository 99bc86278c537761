"""What is measured of images and codes: feature networks, FID and its kin, pixel errors, usage, rates."""
