// The recurrence of an LSTM layer: all steps of both directions in one launch, forward and backward.
//
// A block, or a cluster of 2, 4 or 8 blocks that split the hidden units, owns a tile of samples in one direction and walks their
// steps; it alone writes their outputs and reads nothing that another tile writes. W_hh is read from memory once. A warp owns
// some hidden units, a lane all four gates of one or two of them for one or two samples: the product's sums are in the registers
// where the cell needs them. What the next product reads, h (forward) or dgates (backward), goes through shared memory, to every
// block of the cluster. It has two buffers, so one barrier a step is enough: a buffer is written again only after the barrier
// that its readers reach when they are done.
//
// The first kRegisterTiles x 16 columns of W_hh are in registers, the rest in shared memory in the order of the lanes, 16 bytes
// each: no bank conflicts. Rows of h are padded so that the 8-byte loads of half a warp fall into all banks.
// Floor of a step, in clocks of one multiprocessor: h from shared memory to every warp (kSamples H elements; backward four times
// as many) and W_hh beyond the registers (2 KiB a tile and warp) at 128 bytes a clock; 4 H units kSamples multiplications at 1024
// (sm_80) or 2048 a clock on the tensor cores, 128 on the FMA units; then the latency of the cell, of a barrier and, in a
// cluster, of the way to the other blocks. At H = 128 in 16 bits, forward: 128 + 512 or 256 (sm_90), then about 350. It is
// latency that counts, not bytes: hence tiles of few samples, as many as a tensor core takes.
#pragma once
#include "../common/cell.h"
#include "device.h"
#include "mma.h"

namespace convfast {
namespace cuda {
namespace lstm {

constexpr int kTile = 16;  // columns of W_hh: 16 registers a thread
constexpr int kPad = 16;   // elements behind each row of what is exchanged

// A block's, at most: 255 registers each, or 168.
template <class A>
constexpr int recurrence_threads(int register_tiles) {
  return register_tiles == 8 || sizeof(A) == 4 ? 256 : 384;
}

// A register's worth of neighbouring elements: two of 16 bits or a float.

template <class A>
CONVFAST_DEVICE uint32_t bits(A x) {
  if constexpr (sizeof(A) == 4) return __float_as_uint(x);
  else return x.x;
}

template <class A>
CONVFAST_DEVICE uint32_t pack_word(const float* v) {
  if constexpr (sizeof(A) == 4) return __float_as_uint(v[0]);
  else return pack<A>(v[0], v[1]);
}

template <class A>
CONVFAST_DEVICE float part(uint32_t word, int i) {
  if constexpr (sizeof(A) == 4) return __uint_as_float(word);
  else return i ? unpack<A>(word).y : unpack<A>(word).x;
}

// The word at p, which is aligned to it; zero where not `there`.
template <class A>
CONVFAST_DEVICE uint32_t load_word(const A* p, bool there) {
  if (!there) return 0;
  if constexpr (sizeof(A) == 4) return bits(p[0]);
  const Vec<A, 4 / sizeof(A)> v = load_vec<4 / sizeof(A)>(p);
  uint32_t word;
  memcpy(&word, &v, 4);
  return word;
}

template <class A>
CONVFAST_DEVICE void store_word(A* p, uint32_t word, bool there) {
  Vec<A, 4 / sizeof(A)> v;
  memcpy(&v, &word, 4);
  if (there) store_vec(p, v);
}

template <int N>
CONVFAST_DEVICE void load_floats(const float* p, float (&v)[N], bool there) {
  Vec<float, N> loaded{};
  if (there) loaded = load_vec<N>(p);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = loaded.v[i];
}

template <int N>
CONVFAST_DEVICE void store_floats(float* p, const float (&v)[N], bool there) {
  Vec<float, N> to;
#pragma unroll
  for (int i = 0; i < N; ++i) to.v[i] = v[i];
  if (there) store_vec(p, to);
}

// How a warp multiplies rows of W_hh of kUnits hidden units with kSamples samples: `kTile` columns at a time, of which lane l
// takes the four neighbours from 4 (l % 4). After `own` a lane has the sums of kPair units from unit(lane) and kOwn samples from
// sample(lane), numbered sample * kPair + unit.

// Tensor cores: rows of the fragments are units, two neighbouring ones in rows r and r + 8; its columns are samples. Which column
// of W_hh stands where along K is free, as long as both operands agree.
template <class A>
struct Product {
  static constexpr int kUnits = 16, kSamples = 8, kPair = 2, kOwn = 2;
  static constexpr int kChains = 4;  // of sums: one depends on the one before it for long
  using Operand = uint2;
  static CONVFAST_DEVICE int unit(int lane) { return lane / 4 * 2; }
  static CONVFAST_DEVICE int sample(int lane) { return lane % 4 * 2; }
  // word(row, column): forward, of two neighbouring columns of a unit's row; backward, of two units in one column.
  template <bool kForward, class F>
  static CONVFAST_DEVICE void weights(int lane, const F& word, uint32_t (&w)[4]) {
    const int row = unit(lane), column = lane % 4 * 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = word(row, column + 2 * i);
      const uint32_t second = kForward ? word(row + 1, column + 2 * i) : word(row, column + 2 * i + 1);
      w[2 * i] = kForward ? first : (first & 0xffffu) | second << 16;
      w[2 * i + 1] = kForward ? second : first >> 16 | (second & 0xffff0000u);
    }
  }
  static CONVFAST_DEVICE Operand load(const A* x, int pitch, int lane) {
    const Vec<A, 4> v = load_vec<4>(x + lane / 4 * pitch + lane % 4 * 4);
    return make_uint2(bits(v.v[0]) | bits(v.v[1]) << 16, bits(v.v[2]) | bits(v.v[3]) << 16);
  }
  static CONVFAST_DEVICE void multiply(float (&sum)[4], const uint32_t (&w)[4], const Operand& x) {
    const uint32_t b[2] = {x.x, x.y};
    mma_16816<A>(sum, w, b);
  }
  static CONVFAST_DEVICE void own(const float (&sum)[4], int, float (&z)[kOwn * kPair]) {
    z[0] = sum[0], z[1] = sum[2], z[2] = sum[1], z[3] = sum[3];
  }
};

// FMA: the four lanes of a unit share its columns, then exchange their sums so that each has one sample.
template <>
struct Product<float> {
  static constexpr int kUnits = 8, kSamples = 4, kPair = 1, kOwn = 1;
  static constexpr int kChains = 1;
  struct Operand {
    float4 of[kSamples];
  };
  static CONVFAST_DEVICE int unit(int lane) { return lane / 4; }
  static CONVFAST_DEVICE int sample(int lane) { return lane % 4; }
  template <bool kForward, class F>
  static CONVFAST_DEVICE void weights(int lane, const F& word, uint32_t (&w)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = word(unit(lane), lane % 4 * 4 + i);
  }
  static CONVFAST_DEVICE Operand load(const float* x, int pitch, int lane) {
    Operand operand;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      const Vec<float, 4> v = load_vec<4>(x + s * pitch + lane % 4 * 4);
      operand.of[s] = make_float4(v.v[0], v.v[1], v.v[2], v.v[3]);
    }
    return operand;
  }
  static CONVFAST_DEVICE void multiply(float (&sum)[4], const uint32_t (&w)[4], const Operand& x) {
#pragma unroll
    for (int s = 0; s < kSamples; ++s) {
      sum[s] += __uint_as_float(w[0]) * x.of[s].x;
      sum[s] += __uint_as_float(w[1]) * x.of[s].y;
      sum[s] += __uint_as_float(w[2]) * x.of[s].z;
      sum[s] += __uint_as_float(w[3]) * x.of[s].w;
    }
  }
  static CONVFAST_DEVICE void own(const float (&sum)[4], int lane, float (&z)[1]) {
    const bool upper = lane & 2, odd = lane & 1;
    const float first = (upper ? sum[2] : sum[0]) + __shfl_xor_sync(~0u, upper ? sum[0] : sum[2], 2);
    const float second = (upper ? sum[3] : sum[1]) + __shfl_xor_sync(~0u, upper ? sum[1] : sum[3], 2);
    z[0] = (odd ? second : first) + __shfl_xor_sync(~0u, odd ? first : second, 1);
  }
};

// What both kernels read. Of arrays of two the second is the reverse direction's. With 16 bits H is even and every pointer to A
// aligned to 4 bytes; within a tile of samples the elements of one step are less than 2^31 apart.
template <class A>
struct Layer {
  int batch, time, hidden, directions;
  int tiles, units, cluster, buffers;  // tiles of K, an even number; units of a block
  const A* w_hh[2];                    // [4H, H]
  const A* peephole[2];                // [3, H] or null
  const void* c0;                      // [D, B, H] or null
  bool c0_narrow;                      // of type A, not float
  const int64_t* lengths;              // [B] or null
  int64_t gates_t, gates_b;            // elements between steps and between samples of gates_x or dgates, [.., D 4H]
  int64_t y_t, y_b;                    // of y or dy, [.., D H]
};

// c and gates: [D, T, B, ..].
template <class A>
struct ForwardRecurrence : Layer<A> {
  const A* gates_x;
  const A* h0;  // or null
  A *y, *h_n;
  float *c_n, *c;  // c, gates: null where not saved
  A* gates;
};

template <class A>
struct BackwardRecurrence : Layer<A> {
  const A *dy, *dh_n;  // or null
  const float *dc_n;   // or null
  const float* c;
  const A* gates;
  A *dgates, *dh0;  // dh0, dc0, sums: null where not wanted
  void* dc0;        // of the type of c0
  float* sums;      // [tiles of samples, D, 7, H]: gradients of the four biases and the three peepholes from each tile
};

// Where a thread's cells are: kPair units from `unit` of samples from `sample` of the tile. What depends on the block only is
// kept apart from what depends on the thread, which is an offset of 32 bits: registers are scarce.
template <class A>
struct Place {
  using P = Product<A>;
  int lane, warp, direction, first, sample, unit;  // first: sample of the tile
  bool there[P::kOwn];
  int length[P::kOwn];

  CONVFAST_DEVICE Place(const Layer<A>& p, int rank) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, direction = blockIdx.y, first = int(blockIdx.x) / p.cluster * P::kSamples;
    sample = P::sample(lane), unit = rank * p.units + warp * P::kUnits + P::unit(lane);
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s) {
      const bool in_batch = first + sample + s < p.batch;
      there[s] = in_batch && unit < p.hidden;
      length[s] = !in_batch ? 0 : p.lengths ? int(p.lengths[first + sample + s]) : p.time;
    }
  }
  // The tile's first element in [D, B, H]; at step t in [D, T, B, H].
  CONVFAST_DEVICE int64_t state(const Layer<A>& p) const { return (int64_t(direction) * p.batch + first) * p.hidden; }
  CONVFAST_DEVICE int64_t saved(const Layer<A>& p, int t) const {
    return ((int64_t(direction) * p.time + t) * p.batch + first) * p.hidden;
  }
  // From there to the thread's element of its sample s, where samples are `row` apart.
  CONVFAST_DEVICE unsigned offset(int64_t row, int s) const { return unsigned(sample + s) * unsigned(row) + unsigned(unit); }
};

template <class A>
CONVFAST_DEVICE void load_c0(const Layer<A>& p, const Place<A>& at, int s, float (&c)[Product<A>::kPair]) {
  const int64_t i = at.state(p) + at.offset(p.hidden, s);
  if (p.c0_narrow) {
    const uint32_t word = load_word(static_cast<const A*>(p.c0) + i, at.there[s]);
#pragma unroll
    for (int v = 0; v < Product<A>::kPair; ++v) c[v] = part<A>(word, v);
  } else {
    load_floats(static_cast<const float*>(p.c0) + i, c, at.there[s] && p.c0);
  }
}

// Of hidden unit u, from [3, H]; zero without.
template <class A>
CONVFAST_DEVICE Peephole<float> load_peephole(const A* p, int64_t hidden, int64_t u) {
  if (!p) return {0.f, 0.f, 0.f};
  return {to_float(p[u]), to_float(p[hidden + u]), to_float(p[2 * hidden + u])};
}
template <class A>
CONVFAST_DEVICE void load_peepholes(const Layer<A>& p, const Place<A>& at, Peephole<float> (&peephole)[Product<A>::kPair]) {
  const A* from = at.unit >= p.hidden ? nullptr : at.direction ? p.peephole[1] : p.peephole[0];
#pragma unroll
  for (int v = 0; v < Product<A>::kPair; ++v) peephole[v] = load_peephole(from, p.hidden, at.unit + v);
}

// W_hh, or its transpose for the backward: the first tiles to w, the others to shared memory, each lane where it alone reads
// them. → the lane's place there.
template <class A, bool kForward, int kRegisterTiles>
CONVFAST_DEVICE const uint4* load_weights(const Layer<A>& p, const Place<A>& at, int rank, uint32_t (&w)[kRegisterTiles][4][4]) {
  const A* from = at.direction ? p.w_hh[1] : p.w_hh[0];
  const int first = rank * p.units + at.warp * Product<A>::kUnits, hidden = p.hidden;
  const auto load = [&](int tile, int gate, uint32_t (&words)[4]) {
    const A* const rows = from + int64_t(gate) * hidden * hidden;
    Product<A>::template weights<kForward>(
        at.lane,
        [&](int row, int column) {
          const int unit = first + row, k = tile * kTile + column;
          return load_word(rows + (kForward ? unit * hidden + k : k * hidden + unit), unit < hidden && k < hidden);
        },
        words);
  };
#pragma unroll
  for (int j = 0; j < kRegisterTiles; ++j) {
#pragma unroll
    for (int g = 0; g < 4; ++g) load(j, g, w[j][g]);
    __syncwarp();  // keeps the loads of all tiles from being under way at once, which takes more registers than there are
  }
  uint4* shared = reinterpret_cast<uint4*>(shared_memory()) + at.warp * (p.tiles - kRegisterTiles) * 128 + at.lane;
  for (int j = kRegisterTiles; j < p.tiles; ++j)
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      uint32_t words[4];
      load(j, g, words);
      shared[((j - kRegisterTiles) * 4 + g) * 32] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  return shared;
}

// sum[g] = the product of gate g's weights with x. Backward x has a part for each gate, and the result is the sum of all sum[g].
template <class A, bool kForward, int kRegisterTiles>
CONVFAST_DEVICE void multiply(const uint32_t (&w)[kRegisterTiles][4][4], const uint4* shared, int tiles, const A* x, int pitch,
                              int lane, float (&sum)[4][4]) {
  using P = Product<A>;
  const int part = kForward ? 0 : tiles * kTile;
#pragma unroll
  for (int g = 0; g < 4; ++g)
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[g][i] = 0.f;
#pragma unroll
  for (int j = 0; j < kRegisterTiles; ++j) {
    if constexpr (P::kChains == 1) __syncwarp();  // or more operands are loaded ahead than there are registers
    typename P::Operand operand = P::load(x + j * kTile, pitch, lane);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if (!kForward && g > 0) operand = P::load(x + g * part + j * kTile, pitch, lane);
      P::multiply(sum[kForward ? g : g % P::kChains], w[j][g], operand);
    }
  }
#pragma unroll 1
  for (int j = kRegisterTiles; j < tiles; ++j) {
    typename P::Operand operand = P::load(x + j * kTile, pitch, lane);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if (!kForward && g > 0) operand = P::load(x + g * part + j * kTile, pitch, lane);
      const uint4 v = shared[((j - kRegisterTiles) * 4 + g) * 32];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
      P::multiply(sum[kForward ? g : g % P::kChains], words, operand);
    }
  }
}

// Of all threads that share what is exchanged. Orders shared memory, also of other blocks, before it and after.
template <bool kCluster>
CONVFAST_DEVICE void exchange_barrier() {
  if constexpr (kCluster) cluster_sync();
  else __syncthreads();
}

// word[s][n] to shared[s * pitch + n * part], in every block of the cluster.
template <class A, bool kCluster, int kRows, int kWords>
CONVFAST_DEVICE void exchange(A* shared, int pitch, int part, const uint32_t (&word)[kRows][kWords], int cluster) {
#pragma unroll 1
  for (int r = 0; r < (kCluster ? cluster : 1); ++r) {
    A* to = shared;
    if constexpr (kCluster) to = cluster_map(shared, r);
#pragma unroll
    for (int s = 0; s < kRows; ++s)
#pragma unroll
      for (int n = 0; n < kWords; ++n) store_word(to + s * pitch + n * part, word[s][n], true);
  }
}

template <class A, int kRegisterTiles>
CONVFAST_DEVICE A* exchange_buffers(const Layer<A>& p) {
  return reinterpret_cast<A*>(shared_memory() + (p.tiles - kRegisterTiles) * int(blockDim.x / 32) * 2048);
}

template <class A, int kRegisterTiles, bool kCluster>
__global__ void __launch_bounds__(recurrence_threads<A>(kRegisterTiles), 1) recurrence_forward(ForwardRecurrence<A> p) {
  using P = Product<A>;
  const int rank = kCluster ? int(cluster_rank()) : 0;
  const Place<A> at(p, rank);
  uint32_t w[kRegisterTiles][4][4];
  const uint4* w_shared = load_weights<A, true>(p, at, rank, w);
  const int pitch = p.tiles * kTile + kPad, buffer = P::kSamples * pitch;
  A* const h_shared = exchange_buffers<A, kRegisterTiles>(p);
  for (int i = threadIdx.x; i < 2 * buffer; i += blockDim.x) {
    const int unit = i % pitch, sample = i / pitch;
    const bool given = p.h0 && i < buffer && unit < p.hidden && at.first + sample < p.batch;
    h_shared[i] = given ? p.h0[at.state(p) + sample * p.hidden + unit] : from_float<A>(0.f);
  }
  Peephole<float> peephole[P::kPair];
  load_peepholes(p, at, peephole);

  uint32_t h[P::kOwn][1], next[P::kOwn][4];
  float c[P::kOwn][P::kPair];
  const int step = at.direction ? -1 : 1;
  int t = at.direction ? p.time - 1 : 0;
  const A* gates_x = p.gates_x + t * p.gates_t + at.first * p.gates_b + at.direction * 4 * p.hidden;
  A* y = p.y + t * p.y_t + at.first * p.y_b + at.direction * p.hidden;
#pragma unroll
  for (int s = 0; s < P::kOwn; ++s) {
    h[s][0] = load_word(p.h0 + at.state(p) + at.offset(p.hidden, s), p.h0 && at.there[s]);
    load_c0(p, at, s, c[s]);
#pragma unroll
    for (int g = 0; g < 4; ++g) next[s][g] = load_word(gates_x + g * p.hidden + at.offset(p.gates_b, s), at.there[s]);
  }
  exchange_barrier<kCluster>();

  for (int n = 0; n < p.time; ++n, t += step) {
    uint32_t now[P::kOwn][4], y_now[P::kOwn];
    if (n + 1 < p.time) gates_x += step * p.gates_t;  // the last step's are read once more
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s)
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        now[s][g] = next[s][g];
        next[s][g] = load_word(gates_x + g * p.hidden + at.offset(p.gates_b, s), at.there[s]);
      }
    float sum[4][4], z[4][P::kOwn * P::kPair];
    multiply<A, true>(w, w_shared, p.tiles, h_shared + n % 2 * buffer, pitch, at.lane, sum);
#pragma unroll
    for (int g = 0; g < 4; ++g) P::own(sum[g], at.lane, z[g]);

    const auto cells = [&](auto with_peephole) {
#pragma unroll
      for (int s = 0; s < P::kOwn; ++s) {
        const bool active = t < at.length[s];
        float out[P::kPair], gate[4][P::kPair];
#pragma unroll
        for (int v = 0; v < P::kPair; ++v) {
          const int e = s * P::kPair + v;
          const CellForward<float> r = lstm_cell_forward<DeviceMath, decltype(with_peephole)::value>(
              z[0][e] + part<A>(now[s][0], v), z[1][e] + part<A>(now[s][1], v), z[2][e] + part<A>(now[s][2], v),
              z[3][e] + part<A>(now[s][3], v), c[s][v], peephole[v]);
          gate[0][v] = r.i, gate[1][v] = r.f, gate[2][v] = r.g, gate[3][v] = r.o;
          c[s][v] = active ? r.c : c[s][v];
          out[v] = r.h;
        }
#pragma unroll
        for (int g = 0; g < 4; ++g) now[s][g] = pack_word<A>(gate[g]);
        y_now[s] = active ? pack_word<A>(out) : 0;
        h[s][0] = active ? y_now[s] : h[s][0];
      }
    };
    if (p.peephole[0]) cells(std::true_type());
    else cells(std::false_type());
    if (at.unit < p.hidden) exchange<A, kCluster>(h_shared + (n + 1) % 2 * buffer + at.offset(pitch, 0), pitch, 0, h, p.cluster);
    exchange_barrier<kCluster>();

#pragma unroll
    for (int s = 0; s < P::kOwn; ++s) store_word(y + at.offset(p.y_b, s), y_now[s], at.there[s]);
    y += step * p.y_t;
    if (!p.gates) continue;
    float* const c_saved = p.c + at.saved(p, t);
    A* const gates = p.gates + 4 * at.saved(p, t);
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s) {
      store_floats(c_saved + at.offset(p.hidden, s), c[s], at.there[s]);
#pragma unroll
      for (int g = 0; g < 4; ++g) store_word(gates + g * p.hidden + at.offset(4 * p.hidden, s), now[s][g], at.there[s]);
    }
  }
#pragma unroll
  for (int s = 0; s < P::kOwn; ++s) {
    store_word(p.h_n + at.state(p) + at.offset(p.hidden, s), h[s][0], at.there[s]);
    store_floats(p.c_n + at.state(p) + at.offset(p.hidden, s), c[s], at.there[s]);
  }
}

template <class A, int kRegisterTiles, bool kCluster>
__global__ void __launch_bounds__(recurrence_threads<A>(kRegisterTiles), 1) recurrence_backward(BackwardRecurrence<A> p) {
  using P = Product<A>;
  const int rank = kCluster ? int(cluster_rank()) : 0;
  const Place<A> at(p, rank);
  uint32_t w[kRegisterTiles][4][4];
  const uint4* w_shared = load_weights<A, false>(p, at, rank, w);
  const int pitch = 4 * p.tiles * kTile + kPad, buffer = P::kSamples * pitch;
  A* const shared = exchange_buffers<A, kRegisterTiles>(p);
  for (int i = threadIdx.x; i < p.buffers * buffer; i += blockDim.x) shared[i] = from_float<A>(0.f);
  Peephole<float> peephole[P::kPair];
  load_peepholes(p, at, peephole);

  // What step n of the walk, from the last step to the first, reads from memory.
  const int back = at.direction ? 1 : -1, first = at.direction ? 0 : p.time - 1;
  uint32_t gates_next[P::kOwn][4], dy_next[P::kOwn];
  float dh[P::kOwn][P::kPair], dc[P::kOwn][P::kPair], c_now[P::kOwn][P::kPair], c_next[P::kOwn][P::kPair];
  const auto load_gates = [&](int n) {
    const int t = first + back * n;
    const A* const gates = p.gates + 4 * at.saved(p, t);
    const A* const dy = p.dy + t * p.y_t + at.first * p.y_b + at.direction * p.hidden;
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s) {
#pragma unroll
      for (int g = 0; g < 4; ++g) gates_next[s][g] = load_word(gates + g * p.hidden + at.offset(4 * p.hidden, s), at.there[s]);
      dy_next[s] = load_word(dy + at.offset(p.y_b, s), p.dy && at.there[s]);
    }
  };
  const auto load_c = [&](int n) {
    const float* const c = p.c + at.saved(p, first + back * min(n, p.time - 1));
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s) {
      if (n < p.time) load_floats(c + at.offset(p.hidden, s), c_next[s], at.there[s]);
      else load_c0(p, at, s, c_next[s]);
    }
  };
  load_c(0);
#pragma unroll
  for (int s = 0; s < P::kOwn; ++s) {
    const int64_t i = at.state(p) + at.offset(p.hidden, s);
    const uint32_t dh_n = load_word(p.dh_n + i, p.dh_n && at.there[s]);
    load_floats(p.dc_n + i, dc[s], p.dc_n && at.there[s]);
#pragma unroll
    for (int v = 0; v < P::kPair; ++v) dh[s][v] = part<A>(dh_n, v), c_now[s][v] = c_next[s][v];
  }
  load_c(1);
  load_gates(0);
  float sums[7][P::kPair] = {};
  exchange_barrier<kCluster>();

  for (int n = 0; n < p.time; ++n) {
    const int t = first + back * n;
    uint32_t gates[P::kOwn][4], dy[P::kOwn], dgates[P::kOwn][4];
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s) {
      dy[s] = dy_next[s];
#pragma unroll
      for (int g = 0; g < 4; ++g) gates[s][g] = gates_next[s][g];
    }
    load_gates(min(n + 1, p.time - 1));
    const auto cells = [&](auto with_peephole) {
#pragma unroll
      for (int s = 0; s < P::kOwn; ++s) {
        const bool active = t < at.length[s];
        float d[4][P::kPair];
#pragma unroll
        for (int v = 0; v < P::kPair; ++v) {
          if (active) dh[s][v] += part<A>(dy[s], v);
          const float c_before = c_next[s][v];
          const CellBackward<float> r = lstm_cell_backward<DeviceMath, decltype(with_peephole)::value>(
              part<A>(gates[s][0], v), part<A>(gates[s][1], v), part<A>(gates[s][2], v), part<A>(gates[s][3], v), c_before, c_now[s][v],
              dh[s][v], dc[s][v], peephole[v]);
          d[0][v] = active ? r.di : 0.f, d[1][v] = active ? r.df : 0.f;
          d[2][v] = active ? r.dg : 0.f, d[3][v] = active ? r.d_o : 0.f;
          dc[s][v] = active ? r.dc : dc[s][v];
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[j][v] += d[j][v];
          if constexpr (decltype(with_peephole)::value)
            sums[4][v] += d[0][v] * c_before, sums[5][v] += d[1][v] * c_before, sums[6][v] += d[3][v] * c_now[s][v];
          c_now[s][v] = c_before;
        }
#pragma unroll
        for (int g = 0; g < 4; ++g) dgates[s][g] = pack_word<A>(d[g]);
      }
    };
    if (p.peephole[0]) cells(std::true_type());
    else cells(std::false_type());
    if (at.unit < p.hidden)
      exchange<A, kCluster>(shared + n % p.buffers * buffer + at.offset(pitch, 0), pitch, p.tiles * kTile, dgates, p.cluster);
    load_c(min(n + 2, p.time));
    exchange_barrier<kCluster>();

    A* const out = p.dgates + t * p.gates_t + at.first * p.gates_b + at.direction * 4 * p.hidden;
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s)
#pragma unroll
      for (int g = 0; g < 4; ++g) store_word(out + g * p.hidden + at.offset(p.gates_b, s), dgates[s][g], at.there[s]);
    float sum[4][4], z[P::kOwn * P::kPair];
    multiply<A, false>(w, w_shared, p.tiles, shared + n % p.buffers * buffer, pitch, at.lane, sum);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (P::kChains == 4) sum[0][i] = (sum[0][i] + sum[1][i]) + (sum[2][i] + sum[3][i]);
    P::own(sum[0], at.lane, z);
#pragma unroll
    for (int s = 0; s < P::kOwn; ++s)
#pragma unroll
      for (int v = 0; v < P::kPair; ++v) dh[s][v] = t < at.length[s] ? z[s * P::kPair + v] : dh[s][v];
    if (p.buffers == 1) exchange_barrier<kCluster>();
  }

#pragma unroll
  for (int s = 0; s < P::kOwn; ++s) {
    const int64_t i = at.state(p) + at.offset(p.hidden, s);
    store_word(p.dh0 + i, pack_word<A>(dh[s]), p.dh0 && at.there[s]);
    if (p.c0_narrow) store_word(static_cast<A*>(p.dc0) + i, pack_word<A>(dc[s]), p.dc0 && at.there[s]);
    else store_floats(static_cast<float*>(p.dc0) + i, dc[s], p.dc0 && at.there[s]);
  }
  if (!p.sums) return;
  float* const out = p.sums + (int64_t(at.first / P::kSamples) * p.directions + at.direction) * 7 * p.hidden + at.unit;
#pragma unroll
  for (int j = 0; j < 7; ++j)
#pragma unroll
    for (int v = 0; v < P::kPair; ++v) {
      float sum = sums[j][v];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (at.lane % 4 == 0 && at.unit < p.hidden) out[j * p.hidden + v] = sum;
    }
}

}  // namespace lstm
}  // namespace cuda
}  // namespace convfast
