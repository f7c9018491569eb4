// `viaduct models` and `viaduct recipes`.
