// The raw-pointer kernels behind the CPU backend: no torch, no standard library, one table per instruction set.
//
// Letters: C hidden channels; a *block* is up to 16 neighbouring channels, and its columns are their four gates, in the order
// [i | f | g | o][channels], so that one tile of pre-activations holds all that its cells need. A *frame* is one image,
// channels-last, with its border: [depth][height][width][channels]. A *row* is one line of output pixels. A *run* is a
// stretch of the reduction (K) axis that lies contiguously in a frame: the taps of one kernel row times the channels.
#pragma once

namespace convfast {
namespace cpu {

enum { kBlock = 16, kSlab = 4 * kBlock };

// What a GEMM reads from one frame: at a pixel whose first tap lies at p, run i is p + offset[i] ... + length, and the next
// pixel of the row lies `stride` further.
struct Runs {
  const long* offset;
  long count, length, stride;
};

// Where the row (d, y) of an output image starts in a frame: d * depth + y * height elements from the frame's start.
struct RowMap {
  long depth, height;
};

// Rows of all samples that take part in a step: row r of sample s is pixel row (r / height, r % height).
struct Rows {
  const long* sample;        // [samples] index of each sample that takes part
  long samples, height, rows, width;  // rows = depth * height
};

// Numbers kept for the backward, in T or in 16 bits.
enum Format { kFull, kBfloat16, kHalf };
template <class T>
struct Kept {
  void* data;  // null = not kept
  Format format;
};

template <class T>
struct Operand {
  const T* frames;  // null = absent
  long frame;       // elements from one sample's frame to the next
  RowMap map;
  Runs runs;
};

// out[row, n] = sum over the operands' runs of A[row, k] B[k, n].
template <class T>
struct RowsGemm {
  Rows rows;
  Operand<T> a[2];
  const T* b;            // packed by pack_panels: [panel][k][panel columns]
  long columns, k;
  T* out;                // [sample][row][x][ldo]
  long ldo;
};

// One time step: pre-activations of a tile by GEMM over x and h, then the cell, while the tile is in cache.
template <class T>
struct ConvLSTMStep {
  Rows rows;
  Operand<T> x, h;       // absent operands are skipped; x.runs come first in the packed K axis
  const T* weights;      // [block][panel][k][panel columns]
  const T* bias;         // [block][columns], columns = 4 * channels of the block
  long k, channels;
  const T* gates_x;      // [sample][row][x][4C] added to the pre-activations; null = none
  long gates_x_frame;
  const T* peephole;     // [3][row][x][C]; null = none
  const T* c_prev;       // [sample][row][x][C]; null = zero; may be c itself
  long c_prev_frame;
  T* c;                  // null = not wanted
  long c_frame;
  Kept<T> gates;         // [sample][row][x][block][i | f | g | o][channels of the block], activated
  long gates_frame;
  // Where GatesBackward will read them and put its gradients (its dgates, map and origin), instead of gates; null = not wanted.
  T* blocked_gates;
  long gates_pixels, gates_origin;
  RowMap gates_map;
  bool stream_gates;     // past the cache: nobody reads them before the backward. Whole blocks at aligned addresses only
  T* h_frames;           // next step's recurrent input, inside its border; null = not wanted
  long h_frame;
  RowMap h_map;
  T* out;                // h as [sample][row][x][C]; null = the caller takes it from h_frames
  const long* out_sample;  // [samples] element offset of each sample in out
  bool stream_out;         // as stream_gates
};

// Gradients of the pre-activations, written as bordered frames of blocks: [sample][block][depth][height][width][columns].
template <class T>
struct GatesBackward {
  Rows rows;
  long channels;
  Kept<T> gates;         // as of ConvLSTMStep; not kept: they lie where dgates will
  long gates_frame;
  const T *c_prev, *c;   // c_prev null = zero
  long c_prev_frame, c_frame;
  const T* peephole;
  T* dpeephole;          // [3][row][x][C], added to; null = not wanted
  const T* dh[2];        // [sample][row][x][C] each, summed; null = zero
  long dh_frame[2], dh_stride[2];  // elements from sample to sample, from pixel to pixel
  T* dc;                 // [sample][row][x][C]: gradient of c on entry, of c_prev on exit
  long dc_frame;
  // [block][i | f | g | o][channels of the block], whole vectors, added to; null = not wanted. And the sum of some rows, zero before and after.
  T *dbias, *dbias_part;
  T* dgates;
  long dgates_frame, dgates_pixels;  // elements from sample to sample; pixels of a bordered frame
  long origin;                 // pixels from a frame's start to its first interior one
  RowMap map;                  // in pixels
};

// dw[k, n] += sum over pixels of A[pixel, k] dgates[pixel, n], for the K range of one operand.
template <class T>
struct WeightGrad {
  Rows rows;
  Operand<T> a;
  const T* dgates;       // of one block, from its first interior pixel
  long dgates_frame;
  RowMap dgates_map;
  long columns;
  T* dw;                 // [k][columns rounded up to the panel]
  long row, row_end;     // which of all samples' rows
};

// Rows of n cells side by side. Gates lie at z[gate * z_stride + cell], rows z_next apart; activated and dz likewise.
// All else lies at [cell], rows n apart; the peepholes of i, f and o are peephole_stride apart.
template <class T>
struct CellSpan {
  long n, rows, z_stride, z_next, peephole_stride;
  const T* z;            // forward: pre-activations
  Kept<T> activated;     // forward: written; backward: read
  const T* c_prev;       // null = zero
  const T* peephole;     // null = none
  T *c, *h;              // forward: written; backward: c is read
  const T *dh, *dc;      // backward: null = zero
  T *dz, *dc_prev;       // backward: written
  long dz_stride, dz_next;
  long activated_stride, activated_next;
  T* dpeephole;          // backward: [3], added to; null = not wanted
};

// Winograd: frames are cut into tiles of m×m output pixels, counted along rows, down, in depth, then over the samples that take part.
// A *plane* is one of the (m + r - 1)² products of a tile, a *slab* 64 neighbouring columns of the result (a block's, or the last few).
// A larger kernel is cut into *pieces* of r×r taps: each reads the frame from another pixel on, as if it had more channels.

// Channels of bordered frames: `blocks` stretches of `channels` at every pixel.
template <class T>
struct WinogradInput {
  const T* frames;  // null = absent
  long frame, depth, row, pixel;  // elements from one sample, 2-D frame, row, pixel to the next
  long blocks, block, channels;
};

template <class T>
struct Winograd {
  Rows rows;
  long down, across;  // tiles of a 2-D frame
  long block;         // tiles transformed together
  WinogradInput<T> a[2];
  long pieces;        // of the kernel: the rows that k counts are [input][piece][channel]
  const long* piece;  // pixels from a tile's first to each piece's
  long k;             // of both inputs, the absent second one too
  const T* weights;   // [slab][plane][panel][k][panel columns]
  long group;         // slabs whose products are in scratch together
};

// What one thread does of a step.
struct WinogradRange {
  long tile, tile_end, slab, slab_end;
};

// Gates' gradients as GatesBackward writes them.
template <class T>
struct GateFrames {
  const T* frames;
  long frame, pixels, origin, depth, width, channels;  // pixels, origin, and from 2-D frame to frame and row to row, in pixels
};

// A tile's k in a plane, off the powers of two that would share cache sets; a plane of `tiles` of them, with slack.
static inline long winograd_ld(long k) { return k % 32 ? k : k + 16; }
static inline long winograd_plane(long tiles, long ld) { return tiles * ld + 16; }

// Scratch of one thread: both transforms of a block, the second for `group` slabs.
static inline long winograd_scratch(long planes, long k, long block, long group) {
  return planes * (winograd_plane(block, winograd_ld(k)) + group * winograd_plane(block, kSlab));
}

template <class T>
struct WinogradKernels {
  long m, r, planes;  // output pixels and taps of a side; products of a tile
  void (*step)(const ConvLSTMStep<T>&, const Winograd<T>&, const WinogradRange&, T* scratch);
  void (*rows_gemm)(const RowsGemm<T>&, const Winograd<T>&, const WinogradRange&, T* scratch);
  void (*weight_grad)(const Winograd<T>&, const GateFrames<T>&, const WinogradRange&, T* scratch, T* sums);  // [slab][plane][k][columns]
  void (*filter)(const T* g, long n, T* u, long plane);       // n columns of g [tap][kSlab] to u[point * plane + column]
  void (*filter_gradient)(const T* u, long n, T* g);          // n columns of u [plane][kSlab] to g [tap][kSlab]
};

// Winograd along rows: a tile is m neighbouring rows of results, from the m + r - 1 rows of x that begin with its first, by as many
// products ("planes"). Rows that the last tile lacks count as zero, and are not written. Of n columns whole vectors are read and written.
template <class T>
struct Winograd1d {
  long m, r, planes;
  // [plane][tile][ld] from rows of x (of so many rows of results), or of gradients g of the results.
  void (*input)(long rows, long n, const T* x, long ldx, T* v, long plane, long ldv);
  void (*output_gradient)(long rows, long n, const T* g, long ldg, T* v, long plane, long ldv);
  void (*output)(long rows, long n, const T* v, long plane, long ldv, const T* bias, bool relu, T* out, long ldo);  // bias null = zero
  void (*filter)(long n, const T* g, long ldg, T* u, long plane);           // g [tap][ldg] to u[plane][n]
  void (*filter_gradient)(long n, const T* u, long plane, T* g, long ldg);  // and back
};

// out[row, n] = init[row, n] + sum over k of window(row)[k] B[k, n], or its relu; the window of a row is the runs from
// a[0] + row * stride, then those of a[1].
template <class T>
struct Gemm {
  long rows;
  const T* a[2];         // the second null = absent; to lstm_step the first too, where nothing is to be added to out
  Runs runs[2];
  const T* b;            // packed by pack_panels, k rows, from the first column wanted
  long k, columns;
  const T* init;         // null = zero; may be out
  long ld_init;          // 0: one row for all
  T* out;                // whole vectors are written
  long ldo;
  long ldb;              // not 0: b is not packed, its rows lie so far apart, and whole vectors of them are read
  bool relu;             // of the sum
  bool far;              // out is not in cache: its lines are fetched ahead of the stores
};

// dw[k, n] += sum over rows of window(row)[k] g[row, n], whole vectors of n.
template <class T>
struct OuterSum {
  long rows;
  const T* a;
  Runs runs;
  const T* g;
  long ldg, columns;
  T* dw;
  long ldw;
  const long* at;        // element of dw where each run's rows begin; null: they follow each other
};

// Rows of an LSTM layer at one step. Rows of z and gates are [block][i | f | g | o][channels of the block].
template <class T>
struct LstmCells {
  long rows, channels, begin, end;  // blocks [begin, end)
  T* z;                  // forward: pre-activations; backward: their gradients, written
  long ldz;
  Kept<T> gates;         // activated
  bool stream_gates;     // as of ConvLSTMStep
  long ldg;
  const T* c_prev;       // null = zero; may be c
  long ldc_prev;
  T* c;
  long ldc;
  const T* peephole;     // [3][channels] of i f o; null = none
  T* h;                  // forward
  T* y;                  // forward: h once more, rows ldy apart; null = not wanted
  long ldy;
  const T* dh;           // backward: null = zero; dy[row], null or null rows = zero, is added
  long ldh;              // of h or dh
  const T* const* dy;
  T* dc;                 // gradient of c on entry, of c_prev on exit
  long ld_dc;
  T* dpeephole;          // [3][channels], added to; null = not wanted
  const LstmCells* next; // backward: the step after this one, whose gates, c_prev and dy are asked for; null = none
};

// Rows of numbers as sums of `parts` bfloat16, the nearest first: 3 hold a float32, 2 a float16, 1 a bfloat16. Zero from n to a multiple
// of kSplitDepth.
enum { kSplitDepth = 32 };
struct Split {
  long rows, n, parts;
  const float* from;
  long ld_from;
  unsigned short* to;       // [part][row][ld]
  long part, ld;
};

// out[row, n] = init[n] + sum over k of a[row, k] b[k, n]; init null: out[row, n] itself. Rows may be read and written up to a multiple
// of 16.
struct SplitGemm {
  long rows, parts;
  const unsigned short* a;  // as Split leaves it
  long part, lda;
  const unsigned short* b;  // [32 columns][32 of k][part][16 columns][16 pairs of k][16][2]
  long k, columns;          // multiples of kSplitDepth and kSlab
  const float* init;
  float* out;
  long ldo;
};

struct SplitKernels {
  void (*split)(const Split&);
  void (*gemm)(const SplitGemm&);
  void (*lstm_step)(const SplitGemm& pre_activations, const LstmCells<float>&);
};

// Null where they were not built. dot_kernels: of one part alone.
const SplitKernels* amx_kernels();
const SplitKernels* dot_kernels();

template <class T>
struct Kernels {
  const char* name;
  long lanes;            // of one vector
  long panel;            // columns of a full panel
  void (*rows_gemm)(const RowsGemm<T>&, long begin, long end);        // over samples * rows
  void (*conv_lstm_step)(const ConvLSTMStep<T>&, long begin, long end);
  void (*gates_backward)(const GatesBackward<T>&, long begin, long end);  // over rows when dpeephole, else samples * rows
  void (*weight_grad)(const WeightGrad<T>&, long begin, long end);    // over weight_grad_tasks()
  long (*weight_grad_tasks)(const Runs&);
  void (*sum_rows)(long rows, const T* const* row, long n, T* out);   // out[i] = sum over rows of row[i]
  void (*transpose)(long rows, long columns, const T* src, long ld_src, T* dst, long ld_dst);  // dst[column][row] = src[row][column]
  void (*gemm)(const Gemm<T>&);
  void (*outer_sum)(const OuterSum<T>&);
  void (*lstm_step)(const Gemm<T>& pre_activations, const LstmCells<T>&);
  void (*lstm_cells_backward)(const LstmCells<T>&);
  void (*cell_forward)(const CellSpan<T>&);
  void (*cell_backward)(const CellSpan<T>&);
  void (*sigmoid)(long n, const T* x, T* y);
  void (*tanh)(long n, const T* x, T* y);
  void (*relu)(long n, const T* x, T* y);
  void (*leaky_relu)(long n, const T* x, T* y);
  void (*silu)(long n, const T* x, T* y);
  void (*gelu)(long n, const T* x, T* y);
  // dx from the gradient of the result; x: the result, or for silu and gelu what went in.
  void (*sigmoid_backward)(long n, const T* dy, const T* x, T* dx);
  void (*tanh_backward)(long n, const T* dy, const T* x, T* dx);
  void (*relu_backward)(long n, const T* dy, const T* x, T* dx);
  void (*leaky_relu_backward)(long n, const T* dy, const T* x, T* dx);
  void (*silu_backward)(long n, const T* dy, const T* x, T* dx);
  void (*gelu_backward)(long n, const T* dy, const T* x, T* dx);
  // bfloat16 from and to T, and what convert.h makes of it; null for double.
  void (*widen)(long n, const unsigned short* from, Format, T* to);
  void (*narrow)(long n, const T* from, Format, unsigned short* to);
  void (*pair_rows)(long n, const unsigned short* const* row, unsigned short* to, long panel);
  // runs: one a tap, `length` channels long; w [tap][channel]; bias null = zero. Whole vectors of all but dw are read.
  void (*depthwise)(long rows, const T* x, const Runs& runs, const T* w, const T* bias, T* out, long ldo);
  void (*depthwise_weight_grad)(long rows, const T* x, const Runs& runs, const T* g, long ldg, T* dw);
  const WinogradKernels<T>* winograd[2];  // F(4×4, 3×3), F(2×2, 5×5); null for double
  const Winograd1d<T>* winograd_1d[2];    // F(4, 3), F(2, 5); null for double
};

// The library exports these: tests run the kernels that it runs.
template <class T>
struct __attribute__((visibility("default"))) Table {
  static const Kernels<T>* baseline();
  static const Kernels<T>* avx2();     // null where it was not built
  static const Kernels<T>* avx512();
};

}  // namespace cpu
}  // namespace convfast
