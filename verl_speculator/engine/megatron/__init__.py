"""The Megatron engine. Only `config` may be imported where megatron-core is not installed."""
