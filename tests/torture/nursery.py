"""Imported last by the process that lives are forked from: no collection of a life looks at what
was there before it, nor copies its pages.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
