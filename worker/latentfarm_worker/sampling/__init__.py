"""Sampling on paper: noise, schedules and samplers, with no model in sight.

A sampler is a generator that yields what it wants denoised and is sent the answer, so it runs without any device.
"""
