"""What a job is: the YAML schema, its loading and its checks. Imports no torch, ray, vllm or deepspeed."""
