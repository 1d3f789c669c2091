"""The workload zoo: small pure models, as functions of nested parameters."""
