"""GPTQ with zero points stored as they are (``checkpoint_format: gptq_v2``), as a target.

Everything else is gptq.py's; that one also reads both.
"""

from dataclasses import replace
from functools import partial

from quantkit.formats import gptq

SCALES = gptq.SCALES
FORM = replace(gptq.FORM, zero_min=0)
linears, names, describe, read = gptq.linears, gptq.names, gptq.describe, gptq.read
refusal, specs, beside = gptq.refusal, gptq.specs, gptq.beside
pack = partial(gptq.pack, convention="v2")
configuration = partial(gptq.configuration, convention="v2")
