"""The id of no feature, which arrays of feature ids [examples, slots] hold where a slot is empty.

By itself, since the data path, which has no need of JAX, fills rows with it.
"""

ABSENT = -1
