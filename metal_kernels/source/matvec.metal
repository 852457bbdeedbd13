// Products of packed weights with up to eight columns of activations at a time.
//
// A threadgroup takes TILES tiles of 16 rows; its SLICES simdgroups share out the blocks of 256 columns and add their
// sums at the end, in the same order every time. Activations come as halves, rows of whole blocks: a "column" of the
// product is one such row; with PARTS = 2 two of them, high and low part, make one. Sums are float, and a group's
// scale multiplies its sum.

namespace turboquant {

constexpr int BLOCK = 256;

template <int COLUMNS, bool NVIDIA>
struct Activations {
  uint4 at[COLUMNS];

  // Columns 32p + 8t to 32p + 8t + 7 of a unit for every row of x from `first` on; the last row stands in beyond it.
  void load(Device<const half> x, uint stride, uint first, uint end, uint position, uint lane) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      uint row = first + i < end ? first + i : end - 1;
      at[i] = load4(x + row * stride + position + 8 * (lane % 4));
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Sums {
  static constexpr int VALUES = 2 * COLUMNS;
  float at[VALUES];

  void clear() {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] = 0;
    }
  }

  // Plane q's matrix times the activations.
  void add(uint4 pairs, const thread Activations<COLUMNS, NVIDIA>& x, int q) {
    uint4 w = pairs;
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      uint x0 = q % 2 ? x.at[i].z : x.at[i].x, x1 = q % 2 ? x.at[i].w : x.at[i].y;
      at[i] += low(w.x) * low(x0) + high(w.x) * high(x0) + low(w.z) * low(x1) + high(w.z) * high(x1);
      at[COLUMNS + i] += low(w.y) * low(x0) + high(w.y) * high(x0) + low(w.w) * low(x1) + high(w.w) * high(x1);
    }
  }

  void add_scaled(const thread Sums<COLUMNS, NVIDIA>& other, uint scales) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      at[i] += low(scales) * other.at[i];
      at[COLUMNS + i] += high(scales) * other.at[COLUMNS + i];
    }
  }

  // To partial (16, COLUMNS); the four lanes of a row have a quarter of its columns each.
  void store(Shared<float> partial, uint lane) {
    UNROLL
    for (int i = 0; i < VALUES; i++) {
      at[i] += shuffle_xor(at[i], 1);
      at[i] += shuffle_xor(at[i], 2);
    }
    if (lane % 4 == 0) {
      UNROLL
      for (int i = 0; i < COLUMNS; i++) {
        partial[(lane / 4) * COLUMNS + i] = at[i];
        partial[(lane / 4 + 8) * COLUMNS + i] = at[COLUMNS + i];
      }
    }
  }
};

#ifdef NVIDIA_INSTRUCTIONS
template <int COLUMNS>
struct Activations<COLUMNS, true> {
  uint4 at;

  void load(Device<const half> x, uint stride, uint first, uint end, uint position, uint lane) {
    at = uint4{0, 0, 0, 0};
    if (first + lane / 4 < end) {
      at = load4(x + (first + lane / 4) * stride + position + 8 * (lane % 4));
    }
  }
};

// The matrix unit's own spread of a 16 x 8 result: rows g and g + 8, columns 2t and 2t + 1.
template <int COLUMNS>
struct Sums<COLUMNS, true> {
  float at[4];

  void clear() {
    UNROLL
    for (int i = 0; i < 4; i++) {
      at[i] = 0;
    }
  }

  void add(uint4 pairs, const thread Activations<COLUMNS, true>& x, int q) {
    matrix_multiply(at, pairs, q % 2 ? x.at.z : x.at.x, q % 2 ? x.at.w : x.at.y);
  }

  void add_scaled(const thread Sums<COLUMNS, true>& other, uint scales) {
    at[0] += low(scales) * other.at[0];
    at[1] += low(scales) * other.at[1];
    at[2] += high(scales) * other.at[2];
    at[3] += high(scales) * other.at[3];
  }

  void store(Shared<float> partial, uint lane) {
    UNROLL
    for (int i = 0; i < 4; i++) {
      partial[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = at[i];
    }
  }
};
#endif

// The pairs of scales (rows g and g + 8) of a lane for the groups of one block: scales (tiles, blocks, 8, groups, 2).
template <int GROUPS>
struct Scales {
  uint at[GROUPS];

  void load(Device<const half> scales, uint block, uint lane) {
    Device<const half> mine = scales + (block * 8 + lane / 4) * GROUPS * 2;
    UNROLL
    for (int i = 0; i < GROUPS / 4; i++) {
      uint4 four = load4(mine + 8 * i);
      at[4 * i] = four.x;
      at[4 * i + 1] = four.y;
      at[4 * i + 2] = four.z;
      at[4 * i + 3] = four.w;
    }
    UNROLL
    for (int i = GROUPS / 4 * 4; i < GROUPS; i++) {
      at[i] = load_pair(mine + 2 * i);
    }
  }
};

// One block of one tile. GROUP 0: one scale a row, applied at the end.
template <int BITS, int GROUP, int COLUMNS, bool NVIDIA>
inline void multiply_plane(const thread Words<BITS>& words, const thread Table& table,
                           const thread Activations<COLUMNS, NVIDIA>& x, const thread Scales<GROUP ? 256 / GROUP : 1>& scales,
                           int unit, int q, thread Sums<COLUMNS, NVIDIA>& group, thread Sums<COLUMNS, NVIDIA>& total) {
  uint4 pairs = Decoder<BITS, NVIDIA>::decode(words, unit, q, table);
  group.add(pairs, x, q);
  int done = 16 * (4 * unit + q + 1);
  if (GROUP != 0 && done % (GROUP ? GROUP : 1) == 0) {
    total.add_scaled(group, scales.at[done / (GROUP ? GROUP : 1) - 1]);
    group.clear();
  }
}

// Adds the slices' and parts' sums and writes out (outputs, rows).
template <int TILES, int SLICES, int PARTS, int COLUMNS, typename T>
inline void write_sums(Shared<float> partial, Device<const float> x_scales, Device<T> out, uint first_tile, uint first,
                       uint end, uint rows, uint index) {
  uint outputs = (end - first) / PARTS;
  for (uint i = index; i < uint(16 * TILES) * outputs; i += 32 * SLICES) {
    uint row = i % (16 * TILES), output = i / (16 * TILES);
    float sum = 0;
    for (int slice = 0; slice < SLICES; slice++) {
      UNROLL
      for (int part = 0; part < PARTS; part++) {
        sum += partial[(slice * 16 * TILES + row) * COLUMNS + output * PARTS + part];
      }
    }
    uint at = first / PARTS + output;
    if (first_tile * 16 + row < rows) {
      out[at * rows + first_tile * 16 + row] = static_cast<T>(sum * x_scales[at]);
    }
  }
}

template <int BITS, int GROUP, int TILES, int SLICES, int PARTS, int COLUMNS, bool NVIDIA, typename T>
inline void matvec(Device<const half> x, Device<const float> x_scales, Device<const uint> codes, Device<const half> scales,
                   Device<const uint> table, Device<T> out, Shared<float> partial, uint columns, uint tiles, uint blocks,
                   uint rows, uint group_x, uint group_y, uint slice, uint lane) {
  constexpr int GROUPS = GROUP ? BLOCK / GROUP : 1;
  Table values = load_table(table);
  uint first = group_y * COLUMNS, end = first + COLUMNS < columns ? first + COLUMNS : columns;
  uint first_tile = group_x * TILES;
  Words<BITS> now[TILES], next[TILES];
  Sums<COLUMNS, NVIDIA> group[TILES], total[TILES];
  uint base[TILES];
  UNROLL
  for (int i = 0; i < TILES; i++) {
    base[i] = (first_tile + i < tiles ? first_tile + i : tiles - 1) * blocks;
    group[i].clear();
    total[i].clear();
    if (slice < blocks) {
      next[i] = load_words<BITS>(codes, base[i] + slice, lane);
    }
  }
  for (uint block = slice; block < blocks; block += SLICES) {
    Scales<GROUPS> factors[TILES];
    UNROLL
    for (int i = 0; i < TILES; i++) {
      now[i] = next[i];
      factors[i].load(scales, GROUP ? base[i] + block : base[i] / blocks, lane);
      if (block + SLICES < blocks) {
        next[i] = load_words<BITS>(codes, base[i] + block + SLICES, lane);
      }
    }
    UNROLL
    for (int half_unit = 0; half_unit < 8; half_unit++) {
      Activations<COLUMNS, NVIDIA> some;
      some.load(x, blocks * BLOCK, first, end, block * BLOCK + 32 * half_unit, lane);
      UNROLL
      for (int i = 0; i < TILES; i++) {
        UNROLL
        for (int s = 0; s < 2; s++) {
          multiply_plane<BITS, GROUP, COLUMNS, NVIDIA>(
              now[i], values, some, factors[i], half_unit / 2, 2 * (half_unit % 2) + s, group[i], total[i]);
        }
      }
    }
  }
  UNROLL
  for (int i = 0; i < TILES; i++) {
    if (GROUP == 0) {
      Scales<1> factor;
      factor.load(scales, base[i] / blocks, lane);
      total[i].add_scaled(group[i], factor.at[0]);
    }
    total[i].store(partial + (slice * TILES + i) * 16 * COLUMNS, lane);
  }
  barrier();
  write_sums<TILES, SLICES, PARTS, COLUMNS, T>(partial, x_scales, out, first_tile, first, end, rows, slice * 32 + lane);
}

} // namespace turboquant
