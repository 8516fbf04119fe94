// The index arithmetic of (shifted) windows, compiled for host and device alike.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define E3VA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define E3VA_HOST_DEVICE inline
#endif

// One axis of the map, padded to whole windows and cyclically shifted.
struct WindowAxis {
  int64_t size, window, shift, windows, padded;

  E3VA_HOST_DEVICE WindowAxis(int64_t size, int64_t window, int64_t shift)
      : size(size),
        window(window),
        shift(shift),
        windows((size + window - 1) / window),
        padded(windows * window) {}

  // Position on the map of place `i` in window `w`; at or beyond `size` it is padding.
  E3VA_HOST_DEVICE int64_t position(int64_t w, int64_t i) const {
    int64_t p = w * window + i + shift;
    return p < padded ? p : p - padded;
  }

  // Places of different regions are neighbours only by the cyclic shift.
  E3VA_HOST_DEVICE int region(int64_t w, int64_t i) const {
    if (shift == 0) return 0;
    int64_t shifted = w * window + i;
    return (shifted >= padded - window) + (shifted >= padded - shift);
  }
};

// Row of the position-bias table for query place (qi, qj) and key place (ki, kj) of a window.
E3VA_HOST_DEVICE int64_t position_bias_row(
    int64_t window, int64_t qi, int64_t qj, int64_t ki, int64_t kj) {
  return (qi - ki + window - 1) * (2 * window - 1) + (qj - kj + window - 1);
}
