"""What `--use_compile 1` does: torch.compile writes small operations as one loop."""

import os
import shutil

from dataset.errors import UserError


def require_compiler(device):
    """Raises UserError where torch.compile has nothing to compile with."""
    compilers = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError(
            "--use_compile 1 needs a C++ compiler, and none is on the PATH: install g++ (Linux), "
            "the command line tools (macOS) or Visual Studio's (Windows), or leave the flag out"
        )


def compile_layers(model):
    """Has torch fuse each layer's small operations. The layers are alike, so the first one's code
    serves all: the wait at the first step is that of one layer.
    """
    require_compiler(model.lm_head.weight.device)
    for layer in model.model.layers:
        layer.compile()
