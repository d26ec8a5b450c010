"""diffusers' scheduler_config.json as schedule, grid, sampler, prediction and threshold, and back.

| classes, without "Scheduler" | options |
| --- | --- |
| DDPM, DDIM, DDIMInverse, UnCLIP, PNDM, IPNDM, RePaint | all |
| EulerDiscrete, EulerAncestralDiscrete, HeunDiscrete, LMSDiscrete | all |
| KDPM2Discrete, KDPM2AncestralDiscrete, DPMSolverSDE | all |
| DPMSolverMultistep, DPMSolverSinglestep, DEISMultistep | all |
| UniPCMultistep | all but solver_p |
| EDMEuler, EDMDPMSolverMultistep | all |
| FlowMatchEulerDiscrete, FlowMatchHeunDiscrete | all |
| LCM, TCD, CMStochasticIterative | all |

"All" means every value with which diffusers 0.42.1 gives a finite sample. Values that it accepts
and ignores are refused, unless they are its defaults or options that it stores for others to
read. Every other class (SASolver, CogVideoX's, VQDiffusion, ScoreSdeVe, Amused, …) is refused by
name.
"""

from diffusion_jax.pretrained.schedulers.config import (
    CLASSES,
    Scheduler,
    beta_schedule,
    from_config,
    to_config,
)

__all__ = ["CLASSES", "Scheduler", "beta_schedule", "from_config", "to_config"]
