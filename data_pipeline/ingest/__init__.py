"""`longhaul prepare`: every image of a source verified by decoding, and written into Arrow shards.

`plan` cuts the listing into shards ahead of time; `shard` writes one of them, and is all that a worker does; `verify`
decodes one image; `unfinished` is the directory in which a data set grows; `processes` runs the work on local cores.
"""

from data_pipeline.ingest.plan import SHARD_BYTES, fingerprint
from data_pipeline.ingest.prepare import prepare, quarantine_counts
from data_pipeline.ingest.processes import in_this_process, local_processes
from data_pipeline.ingest.shard import Executor, ShardReport, WriteShard
from data_pipeline.ingest.verify import Options

__all__ = [
    "SHARD_BYTES",
    "Executor",
    "Options",
    "ShardReport",
    "WriteShard",
    "fingerprint",
    "in_this_process",
    "local_processes",
    "prepare",
    "quarantine_counts",
]
