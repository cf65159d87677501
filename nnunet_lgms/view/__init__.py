"""A local page to look with: drop an image, see its segmentation, download the mask.

The page is served by Starlette with one static document, so that every request it answers is written here:

- ``guard``: who may ask at all; token, Host and Origin of every request
- ``folders``: where the program keeps files, and how they go, also those of a program that was killed
- ``session``: one open tab; its image and its labels
- ``app``: the requests
- ``picture``: slices of a case, and how much there is of each label
- ``server``: the program
"""
