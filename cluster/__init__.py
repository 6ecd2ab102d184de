"""The Ray side of a run: who the workers are and what happens when one is lost.

Knows nothing of how a step is computed.
"""
