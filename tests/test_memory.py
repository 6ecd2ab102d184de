"""What `trainer.memory` is for: freed blocks are used again, without the kernel clearing their pages anew."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
if sys.argv[1] == "keep":
    from trainer.memory import keep_freed_memory
    keep_freed_memory()
from configs.schema import Model
from trainer.models import build_model
torch.set_num_threads(1)
model = build_model(Model(name="resnet50"), 10, 0).to(memory_format=torch.channels_last)
images = torch.randn(8, 3, 224, 224).contiguous(memory_format=torch.channels_last)
def step():
    with torch.autocast("cpu", torch.bfloat16):
        model(images).sum().backward()
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    return int(subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_blocks_cost_no_page_faults() -> None:
    assert page_faults("plain") > 20_000, "without the setting two steps clear 80 MB of pages anew: it is needed"
    assert page_faults("keep") < 5_000
