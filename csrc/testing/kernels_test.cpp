// Checks of the kernels that every processor of an architecture has (kernels/baseline.cpp; NEON's on Arm) and of its dot products, for
// machines without Python or of another architecture, by an emulator: runs the one that is named and says what is wrong; returns 3 where
// the processor lacks what is checked; without a name, lists them.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels/kernels.h"
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

using namespace convfast::cpu;

namespace {

void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

// The same everywhere: whole numbers from `least` to `most`.
struct Draw {
  unsigned long long state = 1;
  long operator()(long least, long most) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return least + long((state >> 33) % (unsigned long long)(most - least + 1));
  }
};

// n numbers between -1 and 1, none of them zero, up to a page that nobody may touch.
template <class T>
class Numbers {
 public:
  Numbers(size_t n, unsigned seed) : n_(n) {
    const size_t page = sysconf(_SC_PAGESIZE), before = (n * sizeof(T) + page - 1) / page * page;
    bytes_ = before + page;
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + before, page, PROT_NONE)) std::abort();
    memory_ = static_cast<char*>(p);
    numbers_ = reinterpret_cast<T*>(memory_ + before - n * sizeof(T));
    Draw draw{seed * 2654435761u + 1};
    for (size_t i = 0; i < n; ++i) numbers_[i] = T(double(draw(-(1 << 23), 1 << 23)) / (1 << 23)) + T(1e-6);
  }
  ~Numbers() { munmap(memory_, bytes_); }
  Numbers(const Numbers&) = delete;
  Numbers& operator=(const Numbers&) = delete;

  size_t size() const { return n_; }
  T* data() { return numbers_; }
  const T* data() const { return numbers_; }
  T& operator[](size_t i) { return numbers_[i]; }
  const T& operator[](size_t i) const { return numbers_[i]; }
  std::vector<T> copy() const { return {numbers_, numbers_ + n_}; }

 private:
  char* memory_;
  size_t n_, bytes_;
  T* numbers_;
};

// A panel of the columns from `first` on.
template <class T>
long panel_width(const Kernels<T>& table, long first, long columns) {
  return columns - first > table.lanes ? table.panel : table.lanes;
}

// How many numbers pack() writes.
template <class T>
long packed_size(const Kernels<T>& table, long k, long columns) {
  long size = 0;
  for (long first = 0; first < columns; first += table.panel) size += k * panel_width(table, first, columns);
  return size;
}

// b [k, ldb], zero from `columns` on, as frames.h packs it.
template <class T>
void pack(const Kernels<T>& table, const Numbers<T>& b, long ldb, long k, long columns, Numbers<T>& to) {
  T* next = to.data();
  for (long first = 0; first < columns; first += table.panel)
    for (long row = 0; row < k; ++row)
      for (long n = first; n < first + panel_width(table, first, columns); ++n) *next++ = n < columns ? b[row * ldb + n] : T(0);
}

// Of a sum of `terms` products: at most so many roundings of its size.
template <class T>
void require_near(T found, double exact, double size, long terms, const std::string& where) {
  require(std::fabs(double(found) - exact) <= double(terms + 1) * std::numeric_limits<T>::epsilon() * size,
          where + ": " + std::to_string(double(found)) + " in place of " + std::to_string(exact));
}

// Rows of every height of a tile, K in stretches of any length, weights packed or as they lie, and what else there is to ask for.
template <class T>
void gemm() {
  const Kernels<T>& table = *Table<T>::baseline();
  const long W = table.lanes;
  Draw draw;
  for (int turn = 0; turn < 600; ++turn) {
    const long rows = draw(1, draw(0, 3) ? 12 : 40), columns = draw(1, 19 * W), whole = (columns + W - 1) / W * W, ldo = whole + draw(0, 3);
    const bool packs = draw(0, 2), relu = !draw(0, 3), far = draw(0, 1), adds = !draw(0, 3);
    const long count[2] = {draw(1, 3), draw(0, 2)}, length[2] = {draw(1, 11), draw(1, 9)}, k = count[0] * length[0] + count[1] * length[1];
    long offset[2][3], stride[2], size[2] = {0, 0};
    for (int o = 0; o < 2; ++o) {
      stride[o] = draw(1, 14);
      for (int i = 0; i < count[o]; ++i) {
        offset[o][i] = draw(0, 20);
        size[o] = std::max(size[o], offset[o][i] + (rows - 1) * stride[o] + length[o]);
      }
    }
    const long ldb = whole + draw(0, 5);
    const Numbers<T> a[2] = {{size_t(size[0]), 1}, {size_t(size[1]), 2}}, b((k - 1) * ldb + whole, 3), start(whole, 4);
    Numbers<T> weights(packed_size(table, k, columns), 5), out((rows - 1) * ldo + whole, 6);
    pack(table, b, ldb, k, columns, weights);
    const std::vector<T> before = out.copy();
    table.gemm({rows, {a[0].data(), count[1] ? a[1].data() : nullptr},
                {{offset[0], count[0], length[0], stride[0]}, {offset[1], count[1], length[1], stride[1]}}, packs ? weights.data() : b.data(), k,
                columns, adds ? out.data() : start.data(), adds ? ldo : 0, out.data(), ldo, packs ? 0 : ldb, relu, far});
    for (long r = 0; r < rows; ++r)
      for (long n = 0; n < columns; ++n) {
        double exact = adds ? before[r * ldo + n] : start[n], bound = std::fabs(exact);
        const T* weight = b.data() + n;
        for (int o = 0; o < 2; ++o)
          for (long i = 0; i < count[o]; ++i)
            for (long j = 0; j < length[o]; ++j, weight += ldb) {
              const double term = double(a[o][offset[o][i] + r * stride[o] + j]) * *weight;
              exact += term;
              bound += std::fabs(term);
            }
        require_near(out[r * ldo + n], relu && exact < 0 ? 0 : exact, bound, k + 1, "rows " + std::to_string(rows) + ", k " + std::to_string(k));
      }
    for (long i = 0; i < long(out.size()); ++i)
      require(i % ldo < whole || std::memcmp(&out[i], &before[i], sizeof(T)) == 0, "wrote past the columns");
  }
}

// A 2 x 3 convolution of frames with few channels: several stretches of K, which begin anywhere.
template <class T>
void rows_gemm() {
  const Kernels<T>& table = *Table<T>::baseline();
  for (const long channels : {1, 3, 4, 6})
    for (const long width : {3, 8, 11, 29}) {
      const long samples = 2, height = 4, columns = 20, k = 6 * channels, ld = columns + table.panel, down = height - 1, across = width - 2;
      const long frame = height * width * channels, offset[] = {0, width * channels}, sample[] = {0, 1};
      const Numbers<T> frames(samples * frame, 1), b(k * columns, 2);
      Numbers<T> weights(packed_size(table, k, columns), 3), out(samples * down * across * ld, 4);
      pack(table, b, columns, k, columns, weights);
      RowsGemm<T> p = {};
      p.rows = {sample, samples, down, down, across};
      p.a[0] = {frames.data(), frame, {0, width * channels}, {offset, 2, 3 * channels, channels}};
      p.b = weights.data();
      p.columns = columns;
      p.k = k;
      p.out = out.data();
      p.ldo = ld;
      table.rows_gemm(p, 0, samples * down);
      for (long pixel = 0; pixel < samples * down * across; ++pixel)
        for (long n = 0; n < columns; ++n) {
          const T* window = &frames[pixel / (down * across) * frame + (pixel / across % down * width + pixel % across) * channels];
          double exact = 0, size = 0;
          for (long i = 0; i < k; ++i) {
            const double term = double(window[offset[i / (3 * channels)] + i % (3 * channels)]) * b[i * columns + n];
            exact += term;
            size += std::fabs(term);
          }
          require_near(out[pixel * ld + n], exact, size, k, "channels " + std::to_string(channels) + ", width " + std::to_string(width));
        }
    }
}

template <class T>
void outer_sum() {
  const Kernels<T>& table = *Table<T>::baseline();
  for (const long rows : {1, 5, 70})
    for (const long k : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 20})
      for (const long vectors : {1, 2, 5, 65}) {
        const long columns = vectors * table.lanes, zero = 0;
        const Numbers<T> a(rows * k, 1), g(rows * columns, 2);
        Numbers<T> dw(k * columns, 3);
        const std::vector<T> before = dw.copy();
        table.outer_sum({rows, a.data(), {&zero, 1, k, k}, g.data(), columns, columns, dw.data(), columns, nullptr});
        for (long i = 0; i < k * columns; ++i) {
          double exact = before[i], size = std::fabs(exact);
          for (long r = 0; r < rows; ++r) {
            const double term = double(a[r * k + i / columns]) * g[r * columns + i % columns];
            exact += term;
            size += std::fabs(term);
          }
          require_near(dw[i], exact, size, rows, "rows " + std::to_string(rows) + ", k " + std::to_string(k));
        }
      }
}

template <class T>
void transpose() {
  for (const long rows : {1, 4, 7, 37})
    for (const long columns : {1, 4, 6, 21}) {
      const Numbers<T> from(rows * columns, 1);
      Numbers<T> to(rows * columns, 2);
      Table<T>::baseline()->transpose(rows, columns, from.data(), columns, to.data(), rows);
      for (long i = 0; i < rows * columns; ++i)
        require(to[i % columns * rows + i / columns] == from[i], std::to_string(rows) + " x " + std::to_string(columns));
    }
}

double ulp(double x) {
  int exponent;
  std::frexp(x, &exponent);
  return std::ldexp(1., exponent - 24);
}

// One step of a layer whose hidden units fill blocks or a part of one.
void lstm_step() {
  const Kernels<float>& table = *Table<float>::baseline();
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  for (const long rows : {1, 2, 3, 4, 5, 9, 12})
    for (const long hidden : {1, 4, 15, 16, 17, 40})
      for (const bool kept : {false, true}) {
        const long k = 7, columns = 4 * hidden, ldz = (columns + kSlab - 1) / kSlab * kSlab, zero = 0;
        const Numbers<float> a(rows * k, 1), b(k * columns, 2), bias(ldz, 3);
        Numbers<float> weights(packed_size(table, k, columns), 4), z(rows * ldz, 5), c(rows * hidden, 6), h(rows * hidden, 7), gates(rows * columns, 8);
        pack(table, b, columns, k, columns, weights);
        const std::vector<float> c_prev = c.copy();
        LstmCells<float> cells = {};
        cells.rows = rows;
        cells.channels = hidden;
        cells.end = (hidden + kBlock - 1) / kBlock;
        cells.z = z.data();
        cells.ldz = ldz;
        if (kept) cells.gates = {gates.data(), kFull};
        cells.ldg = columns;
        cells.c_prev = cells.c = c.data();
        cells.ldc_prev = cells.ldc = cells.ldh = hidden;
        cells.h = h.data();
        table.lstm_step({rows, {a.data(), nullptr}, {{&zero, 1, k, k}, {}}, weights.data(), k, columns, bias.data(), 0, z.data(), ldz, 0, false, false},
                        cells);
        for (long r = 0; r < rows; ++r)
          for (long u = 0; u < hidden; ++u) {
            const long block = u / kBlock, width = std::min<long>(kBlock, hidden - block * kBlock);
            double gate[4];
            for (long g = 0; g < 4; ++g) {
              const long n = block * kSlab + g * width + u % kBlock;
              gate[g] = bias[n];
              for (long i = 0; i < k; ++i) gate[g] += double(a[r * k + i]) * b[i * columns + n];
              gate[g] = g == 2 ? std::tanh(gate[g]) : sigmoid(gate[g]);
              if (kept) require(std::fabs(gates[r * columns + n] - gate[g]) < 2e-6, "gate " + std::to_string(g) + " of unit " + std::to_string(u));
            }
            const double exact = gate[1] * c_prev[r * hidden + u] + gate[0] * gate[2];
            require(std::fabs(c[r * hidden + u] - exact) < 4e-6 && std::fabs(h[r * hidden + u] - gate[3] * std::tanh(exact)) < 4e-6,
                    "rows " + std::to_string(rows) + ", unit " + std::to_string(u) + " of " + std::to_string(hidden));
          }
      }
}

// Bounds of tests/test_kernels.py.
void sigmoid_and_tanh() {
  std::vector<float> x;
  for (int i = -400000; i <= 400000; ++i) x.push_back(float(i) * 2.5e-4f);
  const size_t finite = x.size();
  for (const float special : {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f, -0.f}) x.push_back(special);
  std::vector<float> sigmoid(x.size()), tanh(x.size());
  const Kernels<float>& table = *Table<float>::baseline();
  table.sigmoid(x.size(), x.data(), sigmoid.data());
  table.tanh(x.size(), x.data(), tanh.data());
  for (size_t i = 0; i < finite; ++i) {
    const double of_sigmoid = 1 / (1 + std::exp(-double(x[i]))), of_tanh = std::tanh(double(x[i]));
    require(of_sigmoid < 1e-37 || std::fabs(sigmoid[i] - of_sigmoid) <= 4 * ulp(of_sigmoid), "sigmoid of " + std::to_string(x[i]));
    require(std::fabs(tanh[i] - of_tanh) <= 8 * ulp(of_tanh), "tanh of " + std::to_string(x[i]));
  }
  const float *s = &sigmoid[finite], *t = &tanh[finite];
  require(std::isnan(s[0]) && std::isnan(t[0]), "NaN is lost");
  require(s[1] == 1 && s[2] < 1e-37f && s[3] == 1 && s[4] < 1e-37f && s[5] == .5f && s[6] == .5f, "sigmoid of what is large or small");
  require(t[1] == 1 && t[2] == -1 && t[3] == 1 && t[4] == -1 && t[5] == 1e-45f && t[6] == 0 && std::signbit(t[6]), "tanh of what is large or small");
}

// All numbers of 16 bits come back, and what lies between two of them goes to the nearest, of two to the even one.
void halves() {
  const Kernels<float>& table = *Table<float>::baseline();
  for (const Format format : {kBfloat16, kHalf}) {
    const unsigned infinity = format == kHalf ? 0x7c00 : 0x7f80;
    std::vector<unsigned short> all(65536), back(65536), rounded(65536);
    for (size_t i = 0; i < all.size(); ++i) all[i] = (unsigned short)i;
    std::vector<float> wide(65536), between(65536);
    table.widen(65536, all.data(), format, wide.data());
    table.narrow(65536, wide.data(), format, back.data());
    for (unsigned i = 0; i < 65536; ++i) {
      const unsigned size = i & 0x7fff;
      if (format == kHalf && size < infinity) {
        const double exact = size < 0x400 ? std::ldexp(size, -24) : std::ldexp(0x400 + size % 0x400, int(size >> 10) - 25);
        require(wide[i] == (i < 0x8000 ? exact : -exact), "a half is widened wrong: " + std::to_string(i));
      }
      require(size > infinity ? std::isnan(wide[i]) && (back[i] & 0x7fff) > infinity : back[i] == i, "not the same after the way back: " + std::to_string(i));
      between[i] = size + 1 < infinity ? wide[i] / 2 + wide[i + 1] / 2 : wide[i];
    }
    table.narrow(65536, between.data(), format, rounded.data());
    for (unsigned i = 0; i < 65536; ++i)
      if ((i & 0x7fff) + 1 < infinity) require(rounded[i] == i + (i & 1), "halfway is not rounded to even: " + std::to_string(i));
  }
}

struct Missing {};

bool has_dots() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return dot_kernels() && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  return dot_kernels() && (getauxval(AT_HWCAP2) & 1ul << 14);
#else
  return false;
#endif
}

// Two slabs of columns, so that every tile begins in every place of a panel; all that is rounded are sums.
void dots() {
  if (!has_dots()) throw Missing();
  const Kernels<float>& table = *Table<float>::baseline();
  for (const long rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 14, 15, 33})
    for (const long n : {1, 32, 41, 96})
      for (const bool from_out : {false, true}) {
        const long k = (n + 31) / 32 * 32, columns = 2 * kSlab, high = (rows + 15) / 16 * 16;
        const Numbers<float> a(rows * n, 1), b(k * columns, 2), init(high * columns, 3);
        std::vector<unsigned short> parts(high * k), column(k * columns), weights(k * columns);
        dot_kernels()->split({rows, n, 1, a.data(), n, parts.data(), 0, k});
        table.narrow(k * columns, b.data(), kBfloat16, column.data());
        std::vector<float> x(high * k), w(k * columns), out = init.copy();
        table.widen(high * k, parts.data(), kBfloat16, x.data());
        table.widen(k * columns, column.data(), kBfloat16, w.data());
        for (long r = 0; r < rows; ++r)
          for (long i = 0; i < k; ++i)
            require(i < n ? std::fabs(x[r * k + i] - a[r * n + i]) <= std::fabs(a[r * n + i]) / 256 : x[r * k + i] == 0, "rounded wrong");
        for (long i = 0; i < k; ++i)
          for (long c = 0; c < columns; ++c)
            weights[c / 32 * 32 * k + i / 32 * 1024 + c % 32 / 16 * 512 + i % 32 / 2 * 32 + c % 16 * 2 + i % 2] = column[i * columns + c];
        dot_kernels()->gemm({rows, 1, parts.data(), 0, k, weights.data(), k, columns, from_out ? nullptr : init.data(), out.data(), columns});
        for (long r = 0; r < rows; ++r)
          for (long c = 0; c < columns; ++c) {
            double exact = init[from_out ? r * columns + c : c], size = std::fabs(exact);
            for (long i = 0; i < k; ++i) {
              const double term = double(x[r * k + i]) * w[i * columns + c];
              exact += term;
              size += std::fabs(term);
            }
            require_near(out[r * columns + c], exact, size, k, "rows " + std::to_string(rows) + ", k " + std::to_string(k));
          }
      }
}

const std::map<std::string, void (*)()> kChecks{
    {"dots", dots},
    {"gemm_float32", gemm<float>},
    {"gemm_float64", gemm<double>},
    {"halves", halves},
    {"lstm_step", lstm_step},
    {"outer_sum_float32", outer_sum<float>},
    {"outer_sum_float64", outer_sum<double>},
    {"rows_gemm_float32", rows_gemm<float>},
    {"rows_gemm_float64", rows_gemm<double>},
    {"sigmoid_and_tanh", sigmoid_and_tanh},
    {"transpose_float32", transpose<float>},
    {"transpose_float64", transpose<double>},
};

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    for (const auto& [name, check] : kChecks) std::puts(name.c_str());
    return 0;
  }
  const auto found = kChecks.find(arguments[1]);
  if (found == kChecks.end()) return 2;
  try {
    found->second();
    return 0;
  } catch (const Missing&) {
    return 3;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
}
