"""The embedded farm: real Valkey and SeaweedFS servers and workers on this machine, without Docker."""
