// What adapters read around a token, and how that is undone.

// D [rank, side, side] as a row of lr channels for each neighbour, and where that is.
struct Neighbours {
  int64_t height, width, side, rank, lr;
  std::vector<float> D;  // [side * side, lr]; empty without mixing

  E3VA_INLINE Neighbours(
      int64_t height, int64_t width, int64_t side, int64_t rank, const float* from)
      : height(height), width(width), side(from ? side : 0), rank(rank),
        lr(round_up(rank, kLanes)), D(this->side * this->side * lr) {
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t n = 0; n < this->side * this->side; ++n)
        D[n * lr + r] = from[r * this->side * this->side + n];
  }

  // visit(n, token) for each of the token's neighbours that the map has. Each is once more seen
  // from the other side: token is neighbour side² - 1 - n of it.
  template <typename Visit>
  E3VA_INLINE void around(int64_t token, Visit visit) const {
    const int64_t x = token % width, y = token / width % height, reach = side / 2;
    for (int64_t i = 0; i < side; ++i) {
      const int64_t down = i - reach;
      if (y + down < 0 || y + down >= height) continue;
      for (int64_t j = 0; j < side; ++j) {
        const int64_t right = j - reach;
        if (x + right < 0 || x + right >= width) continue;
        visit(i * side + j, token + down * width + right);
      }
    }
  }
};

template <typename T>
E3VA_INLINE Floats load_within(const T* row, int64_t at, int64_t n) {
  return at + kLanes <= n ? load(row + at) : load_some(row + at, n - at);
}

// to [lr] = the token's row of u [tokens, rank] and D times its neighbours'; zero from rank on.
template <typename T>
E3VA_INLINE void mix(
    const Neighbours& neighbours, const T* __restrict__ u, int64_t token,
    float* __restrict__ to) {
  const int64_t R = neighbours.rank, lr = neighbours.lr;
  for (int64_t r = 0; r < lr; r += kLanes) {
    Floats total = load_within(u + token * R, r, R);
    neighbours.around(token, [&](int64_t n, int64_t other) __attribute__((always_inline)) {
      total += load(&neighbours.D[n * lr + r]) * load_within(u + other * R, r, R);
    });
    store(to + r, total);
  }
}
