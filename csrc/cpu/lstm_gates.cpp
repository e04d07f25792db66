// The pointwise cell on the CPU: spans of neighbouring elements, one pass over memory each way. The contract is in ops.h.
// Floor: bytes. Forward reads 5 and writes 2 values an element (6 when saving for backward), backward reads 8 and writes 5.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "frames.h"

namespace convfast {
namespace cpu {
namespace {

constexpr const char* kForward = "lstm_gates_forward";
constexpr const char* kBackward = "lstm_gates_backward";
constexpr long kSpan = 2048;  // elements a task, so that what it widens from narrow types stays in L1

// [B, C, *S] whose memory is either [B, C, *S] or [B, *S, C]. A span runs over the inner axis.
struct Layout {
  long batch = 0, channels = 0, pixels = 1;
  bool last = false;  // channels-last

  long plane() const { return channels * pixels; }
  long gate_stride() const { return last ? channels : plane(); }
  std::vector<int64_t> order(long dims) const {
    std::vector<int64_t> o{0};
    for (long i = last ? 2 : 1; i < dims; ++i) o.push_back(i);
    if (last) o.push_back(1);
    return o;
  }
};

// A task's share of one sample: whole pixels where channels lie innermost, else a stretch of one channel.
struct Piece {
  long sample, rows, n, at, at4;  // at: offset in [C, *S] of the sample; at4: in [4C, *S]
};

struct Spans {
  const Layout& l;
  long per_sample, size;  // size: pixels (channels-last) or elements a piece
  explicit Spans(const Layout& l) : l(l) {
    size = l.last ? std::max<long>(1, kSpan / std::max<long>(1, l.channels)) : kSpan;
    const long stretches = (l.pixels + size - 1) / size;
    per_sample = l.last ? stretches : l.channels * stretches;
  }
  Piece at(long sample, long i) const {
    const long stretches = (l.pixels + size - 1) / size, x = i % stretches * size, count = std::min(size, l.pixels - x);
    if (l.last) return {sample, count, l.channels, x * l.channels, 4 * x * l.channels};
    return {sample, 1, count, i / stretches * l.pixels + x, i / stretches * l.pixels + x};
  }
  long scratch() const { return l.last ? size * l.channels : size; }  // elements of one tensor in a piece
};

// Copies a piece's four gates between a tensor and scratch, which keeps [row][gate][n].
template <class From, class To>
void copy_gates(const Piece& piece, const From* src, long src_stride, long src_next, To* dst, long dst_stride, long dst_next) {
  for (long r = 0; r < piece.rows; ++r)
    for (long g = 0; g < 4; ++g)
      for (long i = 0; i < piece.n; ++i)
        dst[r * dst_next + g * dst_stride + i] = static_cast<To>(src[r * src_next + g * src_stride + i]);
}

bool laid_out(const Tensor& t, const std::vector<int64_t>& order) {
  if (t.numel() == 0) return true;
  int64_t expected = 1;
  for (size_t i = order.size(); i-- > 0;) {
    if (t.size(order[i]) > 1 && t.stride(order[i]) != expected) return false;
    expected *= t.size(order[i]);
  }
  return true;
}

// t itself where it lies in that order, else a copy that does.
Tensor in_order(const Tensor& t, const std::vector<int64_t>& order) {
  if (laid_out(t, order)) return t;
  Tensor copy = empty_ordered(shape_of(t), order, t.scalar_type());
  torch::stable::copy_(copy, t);
  return copy;
}

Layout make_layout(const char* op, const char* argument, const Tensor& gates) {
  const auto shape = shape_of(gates);
  CONVFAST_CHECK(shape.size() >= 2 && shape[1] % 4 == 0, op, argument, "[B, 4C, *S]", shape_string(shape));
  Layout l;
  l.batch = shape[0];
  l.channels = shape[1] / 4;
  for (size_t i = 2; i < shape.size(); ++i) l.pixels *= shape[i];
  Layout last = l;
  last.last = true;
  return !laid_out(gates, l.order(shape.size())) && laid_out(gates, last.order(shape.size())) ? last : l;
}

std::vector<int64_t> state_shape(const Tensor& gates) {
  auto shape = shape_of(gates);
  shape[1] /= 4;
  return shape;
}

// Peepholes [3, C, *S] in the layout of the spans, in the cell's type.
template <class A, class T>
const T* pack_peephole(Workspace& workspace, const OptionalTensor& peephole, const Layout& l) {
  if (!defined(peephole)) return nullptr;
  const Tensor t = torch::stable::contiguous(*peephole);
  const A* src = static_cast<const A*>(t.const_data_ptr());
  T* dst = workspace.take<T>(3 * l.channels * l.pixels);
  for (long g = 0; g < 3; ++g)
    for (long c = 0; c < l.channels; ++c)
      for (long x = 0; x < l.pixels; ++x)
        dst[g * l.channels * l.pixels + (l.last ? x * l.channels + c : c * l.pixels + x)] =
            static_cast<T>(src[(g * l.channels + c) * l.pixels + x]);
  return dst;
}

// A span of narrow values is widened into `scratch`; a wide one is read where it lies.
template <class A, class T>
const T* widen(const A* src, long n, T* scratch) {
  if constexpr (std::is_same_v<A, T>) {
    return src;
  } else {
    convert(src, n, scratch);
    return scratch;
  }
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& gates_in, const OptionalTensor& c, const OptionalTensor& peephole, bool save) {
  using T = Wide<A>;
  constexpr bool kNarrow = !std::is_same_v<A, T>;
  const Kernels<T>& k = kernels<T>();
  const Layout l = make_layout(kForward, "gates", gates_in);
  const auto shape = state_shape(gates_in);
  const auto order = l.order(shape.size());
  const Tensor gates = in_order(gates_in, order);
  Tensor h = empty_ordered(shape, order, scalar_type<A>()), c_out = empty_ordered(shape, order, scalar_type<T>());
  Tensor activated = save ? empty_ordered(shape_of(gates), order, scalar_type<A>()) : empty_cpu({0}, scalar_type<A>());
  const Tensor c_prev = defined(c) ? in_order(*c, order) : c_out;
  const bool c_narrow = kNarrow && defined(c) && c->scalar_type() == scalar_type<A>();
  Workspace workspace;
  const T* p = pack_peephole<A, T>(workspace, peephole, l);

  const A* z = static_cast<const A*>(gates.const_data_ptr());
  const void* cp = defined(c) ? c_prev.const_data_ptr() : nullptr;
  A* h_data = static_cast<A*>(h.mutable_data_ptr());
  T* c_data = static_cast<T*>(c_out.mutable_data_ptr());
  A* a_data = save ? static_cast<A*>(activated.mutable_data_ptr()) : nullptr;
  const Spans pieces(l);
  const long plane = l.plane();
  parallel(l.batch * pieces.per_sample, [&](long begin, long end) {
    const long m = pieces.scratch();
    std::vector<T> scratch(kNarrow ? 6 * m : 0);
    for (long i = begin; i < end; ++i) {
      const Piece piece = pieces.at(i / pieces.per_sample, i % pieces.per_sample);
      const long n = piece.rows * piece.n, at = piece.sample * plane + piece.at, at4 = piece.sample * 4 * plane + piece.at4;
      CellSpan<T> s{};
      s.n = piece.n;
      s.rows = piece.rows;
      s.activated_stride = l.gate_stride();
      s.activated_next = 4 * l.channels;
      if constexpr (kNarrow) {
        s.z_stride = piece.n;
        s.z_next = 4 * piece.n;
        copy_gates(piece, z + at4, l.gate_stride(), 4 * l.channels, scratch.data(), s.z_stride, s.z_next);
        s.z = scratch.data();
        s.h = scratch.data() + 5 * m;
      } else {
        s.z_stride = s.activated_stride;
        s.z_next = s.activated_next;
        s.z = z + at4;
        s.h = h_data + at;
      }
      if (cp) s.c_prev = c_narrow ? widen(static_cast<const A*>(cp) + at, n, scratch.data() + 4 * m) : static_cast<const T*>(cp) + at;
      if (p) s.peephole = p + piece.at;
      s.peephole_stride = plane;
      s.c = c_data + at;
      if (a_data) s.activated = kept(a_data + at4);
      k.cell_forward(s);
      if constexpr (kNarrow) convert(s.h, n, h_data + at);
    }
  });
  return {h, c_out, activated};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& activated, const OptionalTensor& c_in, const Tensor& c_out, const OptionalTensor& peephole,
                                            const OptionalTensor& dh_in, const OptionalTensor& dc_in, const std::vector<int64_t>& needs) {
  using T = Wide<A>;
  constexpr bool kNarrow = !std::is_same_v<A, T>;
  const Kernels<T>& k = kernels<T>();
  const Layout l = make_layout(kBackward, "activated", activated);
  const auto shape = state_shape(activated);
  const auto order = l.order(shape.size());
  CONVFAST_CHECK(laid_out(activated, order) && laid_out(c_out, order), kBackward, "activated and c_out", "in one layout, as the forward returned them",
                 "other strides");
  Tensor dgates = empty_ordered(shape_of(activated), order, scalar_type<A>()), dc = empty_ordered(shape, order, scalar_type<T>());
  const bool need_peephole = defined(peephole) && needs[2];
  Tensor dp = need_peephole ? empty_cpu(shape_of(*peephole), scalar_type<A>()) : empty_cpu({0}, scalar_type<A>());
  Workspace workspace;
  const T* p = pack_peephole<A, T>(workspace, peephole, l);
  const Spans pieces(l);
  const long plane = l.plane();
  T* dp_data = need_peephole ? workspace.take<T>(3 * plane) : nullptr;
  if (dp_data) std::memset(static_cast<void*>(dp_data), 0, 3 * plane * sizeof(T));

  const Tensor c = defined(c_in) ? in_order(*c_in, order) : c_out, dh = defined(dh_in) ? in_order(*dh_in, order) : c_out,
               dco = defined(dc_in) ? in_order(*dc_in, order) : c_out;
  const bool c_narrow = kNarrow && defined(c_in) && c_in->scalar_type() == scalar_type<A>();
  const A* a_data = static_cast<const A*>(activated.const_data_ptr());
  const T* c_data = static_cast<const T*>(c_out.const_data_ptr());
  // All samples of a piece in one task where their peephole gradients add up: one order whatever the threads.
  const long together = dp_data ? l.batch : 1;
  parallel(dp_data ? pieces.per_sample : l.batch * pieces.per_sample, [&](long begin, long end) {
    const long m = pieces.scratch();
    std::vector<T> scratch(kNarrow ? 6 * m : 0);
    for (long i = begin; i < end; ++i)
      for (long j = 0; j < together; ++j) {
        const Piece piece = pieces.at(dp_data ? j : i / pieces.per_sample, i % pieces.per_sample);
        const long n = piece.rows * piece.n, at = piece.sample * plane + piece.at, at4 = piece.sample * 4 * plane + piece.at4;
        CellSpan<T> s{};
        s.n = piece.n;
        s.rows = piece.rows;
        s.activated = kept(a_data + at4);
        s.activated_stride = l.gate_stride();
        s.activated_next = 4 * l.channels;
        if (defined(c_in))
          s.c_prev = c_narrow ? widen(static_cast<const A*>(c.const_data_ptr()) + at, n, scratch.data() + 4 * m)
                              : static_cast<const T*>(c.const_data_ptr()) + at;
        s.c = const_cast<T*>(c_data) + at;
        if (p) s.peephole = p + piece.at;
        s.peephole_stride = plane;
        if (defined(dh_in)) s.dh = widen(static_cast<const A*>(dh.const_data_ptr()) + at, n, scratch.data() + 5 * m);
        if (defined(dc_in)) s.dc = static_cast<const T*>(dco.const_data_ptr()) + at;
        s.dz = kNarrow ? scratch.data() : reinterpret_cast<T*>(dgates.mutable_data_ptr()) + at4;
        s.dz_stride = kNarrow ? piece.n : l.gate_stride();
        s.dz_next = kNarrow ? 4 * piece.n : 4 * l.channels;
        s.dc_prev = static_cast<T*>(dc.mutable_data_ptr()) + at;
        if (dp_data) s.dpeephole = dp_data + piece.at;
        k.cell_backward(s);
        if constexpr (kNarrow)
          copy_gates(piece, scratch.data(), s.dz_stride, s.dz_next, static_cast<A*>(dgates.mutable_data_ptr()) + at4, l.gate_stride(), 4 * l.channels);
      }
  });
  if (dp_data) {
    A* out = static_cast<A*>(dp.mutable_data_ptr());
    for (long g = 0; g < 3; ++g)
      for (long ch = 0; ch < l.channels; ++ch)
        for (long x = 0; x < l.pixels; ++x)
          out[(g * l.channels + ch) * l.pixels + x] = static_cast<A>(dp_data[g * plane + (l.last ? x * l.channels + ch : ch * l.pixels + x)]);
  }
  if (!needs[0]) dgates = empty_cpu({0}, scalar_type<A>());
  if (!needs[1]) dc = empty_cpu({0}, scalar_type<T>());
  return {dgates, dc, dp};
}

std::tuple<Tensor, Tensor, Tensor> lstm_gates_forward(Tensor gates, OptionalTensor c, OptionalTensor peephole, bool save) {
  make_layout(kForward, "gates", gates);
  const ScalarType dtype = gates.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  auto shape = state_shape(gates);
  if (defined(c)) {
    check_shape(kForward, "c", *c, shape);
    check_dtype(kForward, "c", *c, dtype, wide);
  }
  if (defined(peephole)) {
    shape[0] = 3;
    check_shape(kForward, "peephole", *peephole, shape);
    check_dtype(kForward, "peephole", *peephole, dtype, dtype);
  }
  return switch_dtype(kForward, "gates", gates, [&](auto a) { return forward<decltype(a)>(gates, c, peephole, save); });
}

std::tuple<Tensor, Tensor, Tensor> lstm_gates_backward(Tensor activated, OptionalTensor c, Tensor c_out, OptionalTensor peephole, OptionalTensor dh,
                                                       OptionalTensor dc_out, std::vector<int64_t> needs) {
  make_layout(kBackward, "activated", activated);
  const ScalarType dtype = activated.scalar_type(), wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  const auto shape = state_shape(activated);
  CONVFAST_CHECK(needs.size() == 3, kBackward, "needs", "3 flags", needs.size());
  check_shape(kBackward, "c_out", c_out, shape);
  check_dtype(kBackward, "c_out", c_out, wide, wide);
  if (defined(c)) {
    check_shape(kBackward, "c", *c, shape);
    check_dtype(kBackward, "c", *c, dtype, wide);
  }
  if (defined(dh)) {
    check_shape(kBackward, "dh", *dh, shape);
    check_dtype(kBackward, "dh", *dh, dtype, dtype);
  }
  if (defined(dc_out)) {
    check_shape(kBackward, "dc_out", *dc_out, shape);
    check_dtype(kBackward, "dc_out", *dc_out, wide, wide);
  }
  return switch_dtype(kBackward, "activated", activated,
                      [&](auto a) { return backward<decltype(a)>(activated, c, c_out, peephole, dh, dc_out, needs); });
}

}  // namespace
}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CPU, m) {
  m.impl("lstm_gates_forward", TORCH_BOX(&convfast::cpu::lstm_gates_forward));
  m.impl("lstm_gates_backward", TORCH_BOX(&convfast::cpu::lstm_gates_backward));
}
