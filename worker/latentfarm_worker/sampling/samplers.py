"""All twenty samplers of A1111 by name, and how an image walks through one."""

from __future__ import annotations

from latentfarm_worker.sampling import dpm_solver, sigma_methods, timesteps
from latentfarm_worker.sampling.steps import Sampler, TimestepSampler

SAMPLERS: dict[str, Sampler] = {
    "DPM++ 2M": dpm_solver.dpmpp_2m,
    "DPM++ SDE": dpm_solver.dpmpp_sde,
    "DPM++ 2M SDE": dpm_solver.dpmpp_2m_sde("midpoint"),
    "DPM++ 2M SDE Heun": dpm_solver.dpmpp_2m_sde("heun"),
    "DPM++ 2S a": dpm_solver.dpmpp_2s_ancestral,
    "DPM++ 3M SDE": dpm_solver.dpmpp_3m_sde,
    "Euler a": sigma_methods.euler_ancestral,
    "Euler": sigma_methods.euler,
    "LMS": sigma_methods.lms,
    "Heun": sigma_methods.heun,
    "DPM2": sigma_methods.dpm2,
    "DPM2 a": sigma_methods.dpm2_ancestral,
    "DPM fast": dpm_solver.dpm_fast,
    "DPM adaptive": dpm_solver.dpm_adaptive,
    "Restart": sigma_methods.restart,
    "LCM": sigma_methods.lcm,
}
TIMESTEP_SAMPLERS: dict[str, TimestepSampler] = {
    "DDIM": timesteps.ddim,
    "DDIM CFG++": timesteps.ddim_cfg_plus_plus,
    "PLMS": timesteps.plms,
    "UniPC": timesteps.unipc,
}
