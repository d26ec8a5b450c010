"""The samplers that every contract is checked on."""

from diffusion_jax.samplers import DDPM, SAMPLERS

# Rows as they stand in the table, and with options that change what is traced.
ROWS = {
    **{name: make() for name, make in SAMPLERS.items()},
    "ddim_eta": SAMPLERS["ddim"](eta=0.5),
    "ddpm_learned": DDPM("learned_range"),
    "dpm_solver_sde_3m": SAMPLERS["dpm_solver_multistep"](3, "sde-dpmsolver"),
    "dpm_solver_sde_3s": SAMPLERS["dpm_solver_singlestep"](3, "sde-dpmsolver++", "heun"),
    "unipc_3": SAMPLERS["unipc"](3, "bh1", "eps"),
    "heun_churn_1": SAMPLERS["heun_churn"](s_churn=1.0),
    "lms_runge_kutta": SAMPLERS["lms"](start="runge_kutta"),
    "pndm_plms_v": SAMPLERS["pndm"](runge_kutta_start=False, extrapolates="v"),
}
STOCHASTIC = {
    "ddpm",
    "ddim_eta",
    "ddpm_learned",
    "heun_churn_1",
    "euler_ancestral",
    "kdpm2_ancestral",
    "dpm_solver_sde",
    "dpm_solver_sde_3m",
    "dpm_solver_sde_3s",
    "renoise",
    "lcm",
    "tcd",
    "consistency_multistep",
}
