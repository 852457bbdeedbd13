// Products of packed weights with COLUMNS columns of activations at a time, 64 at most.
//
// A threadgroup takes a tile of 16 rows; its SLICES simdgroups share out the blocks of 256 columns and add their sums at
// the end, in the same order every time. Activations come as halves, rows of whole blocks: a "column" of the
// product is one such row; with PARTS = 2 two of them, high and low part, make one. Sums are float, and a group's
// scale multiplies its sum.

namespace turboquant {

CONSTANT int COLUMNS_OF_BLOCK = 256;

// Scales of a row of a block; GROUP 0: one for the whole row.
constexpr int groups_of_block(int group) {
  return group == 0 ? 1 : COLUMNS_OF_BLOCK / group;
}

// Where the rows of x that a lane reads begin; the last row stands in for those beyond it, whose results are dropped.
// X points to a device's or a threadgroup's memory.
template <int COLUMNS, bool NVIDIA, typename X>
struct RowsOfLane {
  CONSTANT int EACH = NVIDIA ? COLUMNS / 8 : COLUMNS;
  X x;
  uint offsets[EACH];

  RowsOfLane(X all, uint stride, uint first, uint end, uint lane) : x(all + 8 * (lane % 4)) {
    UNROLL
    for (int i = 0; i < EACH; i++) {
      uint row = first + (NVIDIA ? 8 * i + lane / 4 : i);
      offsets[i] = (row < end ? row : end - 1) * stride;
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Activations {
  uint4 at[COLUMNS];

  // Columns 32p + 8t to 32p + 8t + 7 of a unit, `position` of them before it; rows as in RowsOfLane.
  template <typename X>
  void load(const thread RowsOfLane<COLUMNS, NVIDIA, X>& rows, uint position) {
    UNROLL
    for (int i = 0; i < COLUMNS; i++) {
      at[i] = load4(rows.x + rows.offsets[i] + position);
    }
  }
};

template <int COLUMNS, bool NVIDIA>
struct Sums {
  CONSTANT int VALUES = 2 * COLUMNS;
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
  uint4 at[COLUMNS / 8];

  template <typename X>
  void load(const thread RowsOfLane<COLUMNS, true, X>& rows, uint position) {
    UNROLL
    for (int i = 0; i < COLUMNS / 8; i++) {
      at[i] = load4(rows.x + rows.offsets[i] + position);
    }
  }
};

// The matrix unit's own spread of each 16 x 8 part of the result: rows g and g + 8, columns 2t and 2t + 1.
template <int COLUMNS>
struct Sums<COLUMNS, true> {
  float at[COLUMNS / 8][4];

  void clear() {
    UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
      at[i / 4][i % 4] = 0;
    }
  }

  void add(uint4 pairs, const thread Activations<COLUMNS, true>& x, int q) {
    UNROLL
    for (int i = 0; i < COLUMNS / 8; i++) {
      matrix_multiply(at[i], pairs, q % 2 ? x.at[i].z : x.at[i].x, q % 2 ? x.at[i].w : x.at[i].y);
    }
  }

  void add_scaled(const thread Sums<COLUMNS, true>& other, uint scales) {
    UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
      at[i / 4][i % 4] += (i % 4 < 2 ? low(scales) : high(scales)) * other.at[i / 4][i % 4];
    }
  }

  void store(Shared<float> partial, uint lane) {
    UNROLL
    for (int i = 0; i < COLUMNS / 2; i++) {
      uint row = lane / 4 + 8 * (i % 4 / 2);
      partial[row * COLUMNS + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = at[i / 4][i % 4];
    }
  }
};
#endif

// The pairs of scales (rows g and g + 8) of a lane for the groups of one block: scales (tiles, blocks, 8, groups, 2).
template <int GROUPS>
struct Scales {
  uint at[GROUPS];

  // `mine` is where those of rows g and g + 8 begin.
  void load(Device<const half> mine) {
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

// A lane's share of one block of one tile, and where to find the next.
template <int BITS, int GROUP>
struct Block {
  CONSTANT int GROUPS = groups_of_block(GROUP);
  Device<const uint> codes;
  Device<const half> factors;
  Words<BITS> words;
  Scales<GROUPS> scales;

  Block(Device<const uint> all, Device<const half> scales_of_all, uint tile, uint blocks, uint block, uint lane)
      : codes(all + (tile * blocks + block) * (128 * BITS) + 4 * lane),
        factors(scales_of_all + ((GROUP ? tile * blocks + block : tile) * 8 + lane / 4) * (2 * GROUPS)) {}

  void load() {
    words = load_words<BITS>(codes);
    scales.load(factors);
  }

  void advance(uint by) {
    codes = codes + by * (128 * BITS);
    factors = factors + (GROUP ? by * (16 * GROUPS) : 0);
  }
};

// Plane q of a unit of one block. GROUP 0: one scale a row, applied at the end.
template <int BITS, int GROUP, int COLUMNS, bool NVIDIA>
inline void multiply_plane(const thread Words<BITS>& words, const thread Table& table,
                           const thread Activations<COLUMNS, NVIDIA>& x,
                           const thread Scales<groups_of_block(GROUP)>& scales, int unit, int q,
                           thread Sums<COLUMNS, NVIDIA>& group, thread Sums<COLUMNS, NVIDIA>& total) {
  constexpr int EACH = GROUP ? GROUP : 1;
  uint4 pairs = Decoder<BITS, NVIDIA>::decode(words, unit, q, table);
  group.add(pairs, x, q);
  int done = 16 * (4 * unit + q + 1);
  if (GROUP != 0 && done % EACH == 0) {
    total.add_scaled(group, scales.at[done / EACH - 1]);
    group.clear();
  }
}

// Sums of one simdgroup, every SLICES-th block from `slice` on of a tile; `next` is there, and has loaded, the first.
template <int BITS, int GROUP, int SLICES, int COLUMNS, bool NVIDIA, typename X>
inline void multiply_blocks(thread Block<BITS, GROUP>& next, const thread RowsOfLane<COLUMNS, NVIDIA, X>& x,
                            const thread Table& table, uint slice, uint blocks, thread Sums<COLUMNS, NVIDIA>& total) {
  Sums<COLUMNS, NVIDIA> group;
  group.clear();
  for (uint block = slice; block < blocks; block += SLICES) {
    Activations<COLUMNS, NVIDIA> some[2];
    some[0].load(x, block * COLUMNS_OF_BLOCK);
    Words<BITS> words = next.words;
    Scales<Block<BITS, GROUP>::GROUPS> factors = next.scales;
    next.advance(SLICES);
    if (block + SLICES < blocks) {
      next.load();
    }
    loads_first();
    UNROLL
    for (int h = 0; h < 8; h++) {
      if (h < 7) {
        some[(h + 1) % 2].load(x, block * COLUMNS_OF_BLOCK + 32 * (h + 1));
        loads_first();
      }
      UNROLL
      for (int j = 0; j < 2; j++) {
        multiply_plane<BITS, GROUP, COLUMNS, NVIDIA>(words, table, some[h % 2], factors, h / 2, 2 * (h % 2) + j, group,
                                                     total);
      }
    }
  }
  if (GROUP == 0) {
    total = group;
  }
}

// Writes one simdgroup's sums of a tile where `add_slices` finds them.
template <int GROUP, int COLUMNS, bool NVIDIA>
inline void store_sums(const thread Sums<COLUMNS, NVIDIA>& total, Device<const half> scales, Shared<float> partial,
                       uint tile, uint slice, uint lane) {
  Sums<COLUMNS, NVIDIA> sums = total;
  if (GROUP == 0) {
    sums.clear();
    sums.add_scaled(total, load_pair(scales + (tile * 8 + lane / 4) * 2));
  }
  sums.store(partial + slice * 16 * COLUMNS, lane);
}

// The sum of a row of a tile and an output over slices and parts, always in the same order.
template <int SLICES, int PARTS, int COLUMNS>
inline float add_slices(Shared<float> partial, uint row, uint output) {
  float sum = 0;
  for (int s = 0; s < SLICES; s++) {
    UNROLL
    for (int part = 0; part < PARTS; part++) {
      sum += partial[(s * 16 + row) * COLUMNS + output * PARTS + part];
    }
  }
  return sum;
}

// What becomes of sums: times the activations' scales, with ADDED plus a row or one row for all.
template <bool ADDED, typename T, typename SCALES>
struct Result {
  Device<T> out;
  SCALES x_scales;
  Device<const T> added;
  uint rows, added_rows;

  float scaled(float sum, uint output) const {
    return static_cast<float>(static_cast<T>(sum * x_scales[output]));
  }

  void write(uint row, uint output, float value) const {
    if (row < rows) {
      float more = ADDED ? static_cast<float>(added[(added_rows > 1 ? output : 0) * rows + row]) : 0;
      out[output * rows + row] = static_cast<T>(value + more);
    }
  }
};

// Columns `group_y` of x, made ready before, times tile `tile`.
template <int BITS, int GROUP, int SLICES, int PARTS, int COLUMNS, bool NVIDIA, typename RESULT>
inline void matvec(Device<const half> x, Device<const uint> codes, Device<const half> scales, Device<const uint> table,
                   const thread RESULT& result, Shared<float> partial, uint columns, uint blocks, uint tile, uint group_y,
                   uint slice, uint lane) {
  Table values = load_table(table);
  uint first = group_y * COLUMNS, end = first + COLUMNS < columns ? first + COLUMNS : columns;
  RowsOfLane<COLUMNS, NVIDIA, Device<const half>> x_rows(x, blocks * COLUMNS_OF_BLOCK, first, end, lane);
  Block<BITS, GROUP> next(codes, scales, tile, blocks, slice, lane);
  if (slice < blocks) {
    next.load();
  }
  Sums<COLUMNS, NVIDIA> total;
  total.clear();
  multiply_blocks<BITS, GROUP, SLICES>(next, x_rows, values, slice, blocks, total);
  store_sums<GROUP>(total, scales, partial, tile, slice, lane);
  barrier();
  for (uint i = slice * 32 + lane; i < 16 * (end - first) / PARTS; i += 32 * SLICES) {
    uint output = first / PARTS + i / 16;
    float sum = add_slices<SLICES, PARTS, COLUMNS>(partial, i % 16, i / 16);
    result.write(16 * tile + i % 16, output, result.scaled(sum, output));
  }
}

} // namespace turboquant
