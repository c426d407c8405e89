"""What ``mii.serve`` launches: MII's own entry, with the hooks.

A process hooks itself where this package is installed. One that only finds it on PYTHONPATH does not, nor with
``DS_FP6_AUTOLOAD=0``; it would serve other than the process that asked for it.
"""

from __future__ import annotations

import runpy

#: The module that MII would run.
MII_ENTRY = "mii.launch.multi_gpu_server"


def main() -> None:
    from ds_fp6.integrations import mii

    mii.install()
    runpy.run_module(MII_ENTRY, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
