"""How tests compile: without optimization, and without what jaxlib 0.10 takes half of the tests' time for.

`sm.jit` names its own options, so what users run is compiled as for them.
"""

import importlib.metadata

# Of jaxlib 0.10. A later one does not know the flag, and ends a process that names it.
_HAS_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
_NO_EMITTERS = " --xla_cpu_use_fusion_emitters=false" if _HAS_EMITTERS else ""

QUICK = f"--xla_backend_optimization_level=0{_NO_EMITTERS}"  # in XLA_FLAGS
AS_JAX_DOES = {"xla_cpu_use_fusion_emitters": True} if _HAS_EMITTERS else {}  # compiler options
