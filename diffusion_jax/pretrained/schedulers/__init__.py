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

What diffusers takes as arguments of `step` and `set_timesteps` instead, `from_config` takes too:

| classes | arguments |
| --- | --- |
| DDIM | eta, use_clipped_model_output |
| TCD | eta, original_inference_steps, strength |
| LCM | original_inference_steps, strength |
| UnCLIP | prev_timestep |
| RePaint | jump_length, jump_n_sample |
| EulerDiscrete, EDMEuler | s_churn, s_tmin, s_tmax, s_noise |
| DPMSolverSDE | s_noise |
| LMSDiscrete | order |

and `Scheduler.grid` takes numbers of steps, timesteps, sigmas and mu.

"All" means every value with which diffusers 0.42.1 gives a finite sample. Combinations in which it
ignores a switch are refused. Options that it stores for others to read, and those of other classes
that released files have left in, are kept and say nothing. Every other class (SASolver,
CogVideoX's, VQDiffusion, ScoreSdeVe, Amused, …) is refused by name.

Samplers are the variants that give diffusers' numbers, its mistakes included: noise in DDPM's last
step, churn after the network's call, third orders that are of second. For better samples from the
same network, put one of `SAMPLERS` with its defaults and a grid of `core.timesteps` on the same
schedule and parameterization.
"""

from diffusion_jax.pretrained.schedulers.config import (
    CLASSES,
    Scheduler,
    beta_schedule,
    from_config,
    to_config,
)

__all__ = ["CLASSES", "Scheduler", "beta_schedule", "from_config", "to_config"]
