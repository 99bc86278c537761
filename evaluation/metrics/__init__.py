"""What is measured of images and codes: feature networks, FID and its kin, pixel errors, usage, rates.

A metric takes features, pairs of images or code indices. It never knows which model they come from.
"""
