from mlx_ops.backend import preload_blas

# MLX's CPU library binds its BLAS when it is loaded: whoever imports mlx_ops first must find the fast one there.
preload_blas()
