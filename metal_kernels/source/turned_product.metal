// Products of few rows of activations, as they come, with a weight in tiles: every threadgroup turns all rows, into
// threadgroup memory, while its first codes are on their way, and then takes one tile after the other.

namespace turboquant {

// Where turned rows lie: (rows * PARTS, STRIDE) halves, and the factors that restore them. The gap after each row keeps
// two rows out of the same banks.
template <int PADDED>
struct Ready {
  CONSTANT uint STRIDE = PADDED + 32;
  Shared<half> halves;
  Shared<float> factors;
};

// What turning takes: threads, those of a team that turns one block, and values that change places at the same time.
template <int ODD, int POWER, int THREADS, int AT_ONCE, bool TRANSFORM>
struct Teams {
  CONSTANT int SIZE = ODD * POWER, ODD_FACTOR = ODD;
  CONSTANT int TEAM = POWER < 32 ? 32 : (POWER < THREADS ? POWER : THREADS);
  CONSTANT int COUNT = THREADS / TEAM;
  CONSTANT int SCRATCH = AT_ONCE * (TEAM + TEAM / 32);
  using Mine = Turn<ODD, POWER, TEAM, TRANSFORM>;
};

// What a whole row decides: the factor that normalises it, 1 where it is taken as it is, and the exponent field of the
// power of two that takes it, once turned, into the range of halves.
template <int THREADS, bool SCALED, int KIND, typename T>
inline uint measure_row(thread Row<KIND, T>& row, float eps, float norm, Shared<float> scratch, uint index) {
  float squares = 0, most = 0;
  for (uint i = index; (SCALED || KIND == NORMED) && i < row.width; i += THREADS) {
    float value = static_cast<float>(row.values[i]);
    squares += value * value;
    value = KIND == NORMED ? value * static_cast<float>(row.weights[i]) : row.at(i);
    most = larger(most, value < 0 ? -value : value);
  }
  if (KIND == NORMED) {
    row.factor = 1 / sqrt(over_threads<THREADS, false>(squares, scratch, index) / row.width + eps);
  }
  return SCALED ? scale_exponent(over_threads<THREADS, true>(most, scratch, index) * row.factor / norm) : 127;
}

// Turns `rows` rows of x; matrix is staged. factors holds 2 * rows floats, of which the second half is for this.
template <typename TEAMS, int THREADS, int AT_ONCE, int PARTS, bool SCALED, int KIND, int WIDTH, int PADDED, typename T>
inline void make_ready(Device<const T> x, Device<const T> weights, float eps, Device<const uint> signs,
                       const thread Ready<PADDED>& ready, Shared<float> scratch, Shared<uint4> matrix, uint rows, uint index) {
  using Mine = typename TEAMS::Mine;
  constexpr uint BLOCKS = WIDTH / TEAMS::SIZE;
  for (uint r = 0; r < rows; r++) {
    Row<KIND, T> row{x + r * WIDTH * (KIND == GATED ? 2 : 1), weights, WIDTH, 1.0f};
    uint exponent = measure_row<THREADS, SCALED>(row, eps, Mine::norm(), scratch, index);
    if (index == 0) {
      ready.factors[r] = bits_float((254u - exponent) << 23);
      ready.factors[rows + r] = row.factor;
    }
  }
  for (uint i = index; i < rows * PARTS * (PADDED - WIDTH); i += THREADS) {
    ready.halves[i / (PADDED - WIDTH) * Ready<PADDED>::STRIDE + WIDTH + i % (PADDED - WIDTH)] = static_cast<half>(0.0f);
  }
  uint team = index / TEAMS::TEAM, place = index % TEAMS::TEAM;
  for (uint first = 0; first < rows * BLOCKS; first += TEAMS::COUNT) {
    barrier();
    bool idle = first + team >= rows * BLOCKS;
    uint which = idle ? 0 : first + team, r = which / BLOCKS, start = which % BLOCKS * TEAMS::SIZE;
    Row<KIND, T> row{x + r * WIDTH * (KIND == GATED ? 2 : 1), weights, WIDTH, ready.factors[rows + r]};
    Mine mine;
    mine.load(row, signs, start, place);
    mine.template transform<AT_ONCE>(scratch + team * TEAMS::SCRATCH, place);
    float factor = Mine::norm() / ready.factors[r];
    for (int b = 0; b < TEAMS::ODD_FACTOR; b++) {
      UNROLL
      for (int i = 0; i < Mine::EACH; i++) {
        float value = mine.value(matrix, b, i) * factor;
        if (!idle && Mine::owns(place)) {
          uint at = r * PARTS * Ready<PADDED>::STRIDE + start + Mine::column(b, i, place);
          write_parts<PARTS, half>(ready.halves, at, Ready<PADDED>::STRIDE, value);
        }
      }
    }
  }
  barrier();
}

// Tiles `first` and every STEP-th after it times the rows that are ready. PAIRED: the first half of the tiles are gates
// of the second, and gate(first, second) is the result.
template <int BITS, int GROUP, int SLICES, int PARTS, int COLUMNS, bool NVIDIA, bool PAIRED, int STEP, int PADDED, typename T>
struct TileWalk {
  CONSTANT uint BLOCKS = PADDED / COLUMNS_OF_BLOCK, EACH = PAIRED ? 2 : 1, PARTIAL = SLICES * 16 * COLUMNS;
  Block<BITS, GROUP> next;
  Device<const uint> codes;
  Device<const half> scales;
  uint end, tile, slice, lane;

  TileWalk(Device<const uint> all_codes, Device<const half> all_scales, uint tiles, uint first, uint my_slice, uint my_lane)
      : next(all_codes, all_scales, first, BLOCKS, my_slice, my_lane), codes(all_codes), scales(all_scales),
        end(tiles / EACH), tile(first), slice(my_slice), lane(my_lane) {
    if (slice < BLOCKS) {
      next.load();
    }
  }

  void seek(uint wanted) {
    next = Block<BITS, GROUP>(codes, scales, wanted, BLOCKS, slice, lane);
    if (slice < BLOCKS) {
      next.load();
    }
  }

  template <typename RESULT>
  void multiply(const thread Ready<PADDED>& ready, Device<const uint> table, Shared<float> partial,
                const thread RESULT& result, uint columns) {
    Table values = load_table(table);
    RowsOfLane<COLUMNS, NVIDIA, Shared<half>> x(ready.halves, Ready<PADDED>::STRIDE, 0, columns, lane);
    for (; tile < end; tile += STEP) {
      UNROLL
      for (uint j = 0; j < EACH; j++) {
        Sums<COLUMNS, NVIDIA> total;
        total.clear();
        multiply_blocks<BITS, GROUP, SLICES>(next, x, values, slice, BLOCKS, lane, total);
        if (j + 1 < EACH) {
          seek(tile + end);
        } else if (tile + STEP < end) {
          seek(tile + STEP);
        }
        store_sums<GROUP>(total, scales, partial + j * PARTIAL, tile + j * end, slice, lane);
      }
      barrier();
      for (uint i = slice * 32 + lane; i < 16 * columns / PARTS; i += 32 * SLICES) {
        uint row = i % 16, output = i / 16;
        float value = result.scaled(add_slices<SLICES, PARTS, COLUMNS>(partial, row, output), output);
        if (PAIRED) {
          float up = result.scaled(add_slices<SLICES, PARTS, COLUMNS>(partial + PARTIAL, row, output), output);
          value = static_cast<float>(gate<T>(value, up));
        }
        result.write(16 * tile + row, output, value);
      }
      barrier();
    }
  }
};

} // namespace turboquant
