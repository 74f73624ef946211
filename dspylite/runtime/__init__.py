"""What carries every call.

Settings, the crossing of threads and loops, drivers, call frames, tracking.
"""
