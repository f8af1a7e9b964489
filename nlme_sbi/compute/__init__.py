"""Devices, threads and processes, random streams, progress and interruptions: how work is done, not what."""
