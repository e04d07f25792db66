// CUDA's programming model on the CPU, for tests: the same .cu is compiled as C++ and its threads run as fibers of one OS thread.
//
// A fiber runs until it waits for others; which one goes next is drawn by a seed (CONVFAST_EMULATE_SEED), so code that relies
// on an order without a barrier gives another result with some seed. The blocks of a cluster or of a cooperative grid run
// together, others one after another in a drawn order. mma, ldmatrix and shuffles wait for all lanes and follow PTX's layouts.
// Shared memory starts as NaN and is followed by 1 KiB that nobody may write. What an asynchronous copy writes is NaN until it is
// waited for; products of warpgroups read shared memory and give their sums only when they are waited for. A barrier that some fiber never
// reaches is an error that names the kernel's parameters, the block and the thread.
// Global accesses are not checked here: compile with -fsanitize=address and preload libasan for that; it knows of the fibers.
#pragma once
#include <cxxabi.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <typeinfo>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using cudaStream_t = void*;

// Saves the callee's registers and stack pointer in *save, goes on where `load` was saved.
extern "C" void convfast_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.pushsection .text
.weak convfast_switch
.hidden convfast_switch
.type convfast_switch, @function
convfast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");
#elif defined(__aarch64__)
asm(R"(
.pushsection .text
.weak convfast_switch
.hidden convfast_switch
.type convfast_switch, %function
convfast_switch:
  sub sp, sp, #176
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #176
  ret
.popsection
)");
#else
#error "the SIMT emulator knows x86-64 and aarch64 only"
#endif

namespace convfast {
namespace simt {

constexpr size_t kStack = 128 * 1024, kGuard = 1024, kSharedAlignment = 1024;
constexpr uint64_t kStackMark = 0x5ca1ab1e5ca1ab1e;

struct Group;
struct Block;
struct Fiber;

inline long setting(const char* name, long otherwise) {
  const char* given = getenv(name);
  return given && *given ? strtol(given, nullptr, 10) : otherwise;
}

struct Barrier {
  const char* name;
  size_t expected = 0, arrived = 0;
  uint64_t phase = 0;
  std::vector<Fiber*> waiting;
};

// Lanes that have come to one warp-wide operation.
struct Meeting {
  const char* name;
  unsigned mask, arrived = 0;
  void* arguments[32];
  Fiber* fibers[32];
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

// Of a warpgroup: sums [64, columns] += a b^T.
struct Product {
  const char *a, *b;
  float (*value)(uint16_t);
};

struct Fiber {
  dim3 thread;
  unsigned flat = 0;
  Block* block = nullptr;
  char* stack = nullptr;
  void* saved = nullptr;
  void* sanitizer = nullptr;
  const char* waits_at = nullptr;
  bool done = false;
  uint64_t cluster_phase = 0;
  std::vector<Copy> copies;     // asynchronous, not yet waited for
  std::vector<size_t> commits;  // ends of groups in `copies`
  std::vector<Product> products;          // asynchronous, not yet waited for
  std::vector<size_t> product_commits;
  std::vector<float> sums;                // of products: what the thread will have in place of
  float* sums_at = nullptr;               // the NaN there

  unsigned lane() const { return flat % 32; }
};

struct Block {
  dim3 index, size, grid;
  unsigned rank = 0;
  Group* group = nullptr;
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, free};
  size_t shared_bytes = 0, left = 0;
  Barrier barrier{"__syncthreads"};
  std::vector<std::vector<Meeting>> meetings;  // of each warp
  std::vector<Fiber*> fibers;

  unsigned threads() const { return size.x * size.y * size.z; }
};

inline thread_local Fiber* current __attribute__((tls_model("initial-exec"))) = nullptr;
inline Fiber& self() { return *current; }

[[noreturn]] inline void fail(const std::string& what) {
  const Fiber& f = self();
  const dim3 b = f.block->index;
  throw std::runtime_error(what + ", block (" + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " + std::to_string(b.z) + "), thread " +
                           std::to_string(f.flat));
}

// The blocks that run together, and their threads.
struct Group {
  std::function<void()> kernel;
  std::string name;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  Barrier everyone{"the barrier of all blocks"};
  std::exception_ptr error;
  void* scheduler = nullptr;
  uint64_t random = 0;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  void* sanitizer = nullptr;

  uint64_t draw() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }

  void add_block(dim3 index, dim3 grid, dim3 size, size_t shared_bytes) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->grid = grid;
    block->size = size;
    block->rank = blocks.size();
    block->group = this;
    block->shared_bytes = shared_bytes;
    const size_t bytes = (shared_bytes + kGuard + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    block->memory.reset(static_cast<char*>(aligned_alloc(kSharedAlignment, bytes)));
    memset(block->memory.get(), 0xff, bytes);
    block->left = block->barrier.expected = block->threads();
    block->meetings.resize((block->threads() + 31) / 32);
    for (unsigned i = 0; i < block->threads(); ++i) {
      auto fiber = std::make_unique<Fiber>();
      fiber->thread = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
      fiber->flat = i;
      fiber->block = block.get();
      block->fibers.push_back(fiber.get());
      ready.push_back(fiber.get());
      fibers.push_back(std::move(fiber));
    }
    blocks.push_back(std::move(block));
    everyone.expected = fibers.size();
  }

  void run();
  void check_stuck();
};

inline void enter(void* from_stack_save, const void** old_stack, size_t* old_size) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from_stack_save, old_stack, old_size);
#else
  (void)from_stack_save, (void)old_stack, (void)old_size;
#endif
}

// Back to the scheduler; whoever is waited for puts the fiber among the ready ones again.
inline void suspend() {
  Fiber* f = current;
  Group& g = *f->block->group;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(f->done ? nullptr : &f->sanitizer, g.scheduler_stack, g.scheduler_size);
#endif
  convfast_switch(&f->saved, g.scheduler);
  enter(f->sanitizer, nullptr, nullptr);
}

inline void block_at(const char* what) {
  self().waits_at = what;
  suspend();
  self().waits_at = nullptr;
}

inline void resume(Fiber* f) { f->block->group->ready.push_back(f); }

inline void fiber_main() {
  Fiber* f = current;
  Group& g = *f->block->group;
  enter(nullptr, &g.scheduler_stack, &g.scheduler_size);
  try {
    g.kernel();
    if (!f->products.empty()) fail(g.name + ": the thread ends before its products are waited for");
  } catch (...) {
    if (!g.error) g.error = std::current_exception();
  }
  f->done = true;
  // A block's shared memory ends with it: whoever reads it from another block of the cluster later gets NaN.
  if (--f->block->left == 0) memset(f->block->memory.get(), 0xff, f->block->shared_bytes);
  suspend();
  abort();
}

// Stacks live as long as their OS thread.
inline char* stack(size_t i) {
  static thread_local std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("SIMT emulator: no memory for stacks");
    stacks.push_back(static_cast<char*>(p));
  }
  return stacks[i];
}

inline void Group::check_stuck() {
  for (const auto& f : fibers) {
    if (f->done) continue;
    current = f.get();
    size_t left = 0;
    for (const Fiber* other : f->block->fibers) left += other->done;
    fail(name + ": deadlock at " + f->waits_at + " (of the block's " + std::to_string(f->block->threads()) + " threads " +
         std::to_string(left) + " have ended)");
  }
}

inline void Group::run() {
  // mixed, so that neighbouring seeds draw other orders; never zero
  random = (uint64_t(setting("CONVFAST_EMULATE_SEED", 0)) + 1) * 0x9e3779b97f4a7c15u | 1;
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber* f = fibers[i].get();
    f->stack = stack(i);
    memcpy(f->stack, &kStackMark, sizeof kStackMark);
    void** top = reinterpret_cast<void**>(f->stack + kStack);
#if defined(__x86_64__)
    // six registers, the address that `ret` takes, and one word so that the stack is aligned as after a call
    top -= 8;
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(&fiber_main);
#else
    top -= 22;
    memset(top, 0, 22 * sizeof(void*));
    top[11] = reinterpret_cast<void*>(&fiber_main);
#endif
    f->saved = top;
  }
  Fiber* const outer = current;
  while (!ready.empty() && !error) {
    const size_t i = draw() % ready.size();
    Fiber* f = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
    current = f;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&sanitizer, f->stack, kStack);
#endif
    convfast_switch(&scheduler, f->saved);
    enter(sanitizer, nullptr, nullptr);
  }
  try {
    if (error) std::rethrow_exception(error);
    check_stuck();
    for (const auto& f : fibers) {
      current = f.get();
      if (memcmp(f->stack, &kStackMark, sizeof kStackMark)) fail(name + ": stack overflow");
    }
    for (const auto& b : blocks)
      for (size_t i = b->shared_bytes; i < b->shared_bytes + kGuard; ++i) {
        current = b->fibers[0];
        if (b->memory.get()[i] != char(0xff)) fail(name + ": wrote past its " + std::to_string(b->shared_bytes) + " bytes of shared memory");
      }
  } catch (...) {
    current = outer;
    throw;
  }
  current = outer;
}

inline void arrive(Barrier& b) {
  if (++b.arrived < b.expected) return;
  b.arrived = 0;
  ++b.phase;
  for (Fiber* f : b.waiting) resume(f);
  b.waiting.clear();
}

inline void wait(Barrier& b, uint64_t phase) {
  if (b.phase == phase) b.waiting.push_back(current);
  else resume(current);  // the last to come is not always the first to go on
  block_at(b.name);
}

inline void arrive_and_wait(Barrier& b) {
  const uint64_t phase = b.phase;
  arrive(b);
  wait(b, phase);
}

// Waits for the lanes of `mask`; the last to come runs operation(arguments of all lanes) for everyone.
template <class Arguments, class Operation>
void meet(const char* name, unsigned mask, Arguments& mine, const Operation& operation) {
  Fiber& f = self();
  const unsigned warp = f.flat / 32, lane = f.lane(), present = std::min(32u, f.block->threads() - warp * 32);
  if (present < 32) mask &= (1u << present) - 1;
  if (!(mask >> lane & 1)) fail(std::string(name) + ": the mask has not the lane itself");
  auto& meetings = f.block->meetings[warp];
  auto m = std::find_if(meetings.begin(), meetings.end(), [&](const Meeting& m) { return m.mask == mask; });
  if (m == meetings.end()) m = meetings.insert(m, Meeting{name, mask, 0, {}, {}});
  if (strcmp(m->name, name)) fail(std::string("lanes of one warp are at ") + name + " and at " + m->name);
  m->arguments[lane] = &mine;
  m->fibers[lane] = &f;
  m->arrived |= 1u << lane;
  if (m->arrived != mask) return block_at(name);
  Arguments* all[32] = {};
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1) all[i] = static_cast<Arguments*>(m->arguments[i]);
  operation(all);
  for (unsigned i = 0; i < 32; ++i)
    if ((mask >> i & 1) && i != lane) resume(m->fibers[i]);
  meetings.erase(m);
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, const std::function<int(int)>& source) {
  struct Value {
    T in, out;
  } mine{value, value};
  meet(name, mask, mine, [&](Value** all) {
    for (int i = 0; i < 32; ++i)
      if (const int from = source(i); all[i] && from >= 0 && from < 32 && all[from]) all[i]->out = all[from]->in;
  });
  return mine.out;
}

inline void check_shared(const char* name, const void* p, size_t bytes) {
  const Block& b = *self().block;
  const char* at = static_cast<const char*>(p);
  if (at < b.memory.get() || at + bytes > b.memory.get() + b.shared_bytes) fail(std::string(name) + ": address is not in the block's shared memory");
  if (uintptr_t(at) % bytes) fail(std::string(name) + ": shared address is not aligned to " + std::to_string(bytes) + " bytes");
}

inline void copy_async(void* to, const void* from, int bytes, bool valid) {
  check_shared("cp.async", to, bytes);
  if (uintptr_t(from) % bytes) fail("cp.async: global address is not aligned to " + std::to_string(bytes) + " bytes");
  memset(to, 0xff, bytes);
  self().copies.push_back({to, from, bytes, valid});
}

inline void copy_wait(size_t outstanding) {
  Fiber& f = self();
  if (f.commits.size() <= outstanding) return;
  const size_t groups = f.commits.size() - outstanding, n = f.commits[groups - 1];
  for (size_t i = 0; i < n; ++i) {
    const Copy& c = f.copies[i];
    if (c.valid) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + n);
  f.commits.erase(f.commits.begin(), f.commits.begin() + groups);
  for (size_t& end : f.commits) end -= n;
}

inline void copy_commit() { self().commits.push_back(self().copies.size()); }

// 8 x 8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m. Lane l gets elements
// [l / 4][2 (l % 4) + {0, 1}] of each, or with `trans` of its transposed.
template <int kMatrices>
void load_matrices(uint32_t (&r)[kMatrices], const void* address, bool trans) {
  struct Lane {
    const void* address;
    uint32_t* r;
    unsigned lane;
  } mine{address, r, self().lane()};
  if (mine.lane < 8 * kMatrices) check_shared("ldmatrix", address, 16);
  meet(trans ? "ldmatrix.trans" : "ldmatrix", ~0u, mine, [&](Lane** all) {
    for (int m = 0; m < kMatrices; ++m)
      for (int l = 0; l < 32; ++l) {
        const auto element = [&](int row, int col) {
          uint16_t value;
          memcpy(&value, static_cast<const char*>(all[8 * m + row]->address) + 2 * col, 2);
          return uint32_t(value);
        };
        const int a = l / 4, b = 2 * (l % 4);
        all[l]->r[m] = trans ? element(b, a) | element(b + 1, a) << 16 : element(a, b) | element(a, b + 1) << 16;
      }
  });
}

// d [16, 8] += a [16, K] b [K, 8]; value(word, part) is the float in a word of a fragment.
template <int K, int kWords, class Value>
void multiply(const char* name, float (&d)[4], const uint32_t (&a)[kWords], const uint32_t (&b)[kWords / 2], const Value& value) {
  constexpr int kParts = K / (kWords / 2) / 4;  // elements in a word: 2 of 16 bits or 1 of 32
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  meet(name, ~0u, mine, [&](Lane** all) {
    float x[16][K], y[K][8], z[16][8];
    for (int l = 0; l < 32; ++l)
      for (int part = 0; part < kParts; ++part) {
        const int g = l / 4, k = l % 4 * kParts + part;
        for (int w = 0; w < kWords; ++w) x[g + 8 * (w % 2)][k + 4 * kParts * (w / 2)] = value(all[l]->a[w], part);
        for (int w = 0; w < kWords / 2; ++w) y[k + 4 * kParts * w][g] = value(all[l]->b[w], part);
      }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) z[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2] = all[l]->d[i];
    for (int k = 0; k < K; ++k)
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) z[i][j] += x[i][k] * y[k][j];
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) all[l]->d[i] = z[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  });
}

// d: the thread's part of sums [64, columns], as mma has it of each 16 x 8 tile of its warp's 16 rows, columns after columns. a, b: rows of
// 64 bytes, of which 32 bytes are read, in a swizzle of 64 bytes.
inline void multiply_async(float* d, int columns, const char* a, const char* b, float (*value)(uint16_t)) {
  Fiber& f = self();
  for (const char* matrix : {a, b}) {
    check_shared("wgmma", matrix, 16);
    if (uintptr_t(matrix) % 512 != 0 && uintptr_t(matrix) % 512 != 32) fail("wgmma: a matrix is not aligned to 512 bytes, or 32 behind that");
  }
  if (f.products.empty()) {
    f.sums.assign(d, d + columns / 2);
    f.sums_at = d;
  } else if (f.sums_at != d) {
    fail("wgmma: other sums while products are under way");
  }
  std::fill(d, d + columns / 2, NAN);
  f.products.push_back({a, b, value});
}

inline void multiply_commit() { self().product_commits.push_back(self().products.size()); }

inline void multiply_wait(size_t outstanding) {
  Fiber& f = self();
  if (f.product_commits.size() <= outstanding) return;
  const size_t groups = f.product_commits.size() - outstanding, n = f.product_commits[groups - 1];
  const int warp = f.flat / 32 % 4, g = f.lane() / 4, q = f.lane() % 4;
  for (size_t i = 0; i < n; ++i) {
    const Product& p = f.products[i];
    const auto element = [&](const char* matrix, int row, int k) {
      const uintptr_t at = uintptr_t(matrix) + row * 64 + k * 2, swizzled = at ^ (at >> 7 & 3) << 4;
      check_shared("wgmma", reinterpret_cast<const void*>(swizzled & ~uintptr_t(15)), 16);
      uint16_t bits;
      memcpy(&bits, reinterpret_cast<const void*>(swizzled), 2);
      return p.value(bits);
    };
    for (size_t s = 0; s < f.sums.size(); ++s) {
      const int row = 16 * warp + g + s / 2 % 2 * 8, column = s / 4 * 8 + 2 * q + s % 2;
      for (int k = 0; k < 16; ++k) f.sums[s] += element(p.a, row, k) * element(p.b, column, k);
    }
  }
  f.products.erase(f.products.begin(), f.products.begin() + n);
  f.product_commits.erase(f.product_commits.begin(), f.product_commits.begin() + groups);
  for (size_t& end : f.product_commits) end -= n;
  if (f.products.empty()) std::copy(f.sums.begin(), f.sums.end(), f.sums_at);
}

template <class T>
std::string type_name() {
  int status;
  std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(typeid(T).name(), nullptr, nullptr, &status), free);
  return status == 0 ? name.get() : typeid(T).name();
}

// `together` blocks with neighbouring x run at the same time; 0: all of the grid.
template <class Params>
void run(void (*kernel)(Params), dim3 grid, dim3 size, size_t shared_bytes, unsigned together, const Params& params) {
  const size_t count = size_t(grid.x) * grid.y * grid.z;
  if (count == 0) return;
  const std::string name = "kernel of " + type_name<Params>();
  if (size.x * size.y * size.z == 0 || size.x * size.y * size.z > 1024) throw std::runtime_error(name + ": more than 1024 threads, or none");
  if (long(shared_bytes) > setting("CONVFAST_CUDA_SHARED", 227 * 1024)) throw std::runtime_error(name + ": too much shared memory");
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) throw std::runtime_error(name + ": the grid is too large");
  const size_t of_group = together ? together : count, groups = count / of_group;
  if (together && grid.x % together) throw std::runtime_error(name + ": the grid is not a multiple of the cluster");
  std::vector<size_t> order(groups);
  for (size_t i = 0; i < groups; ++i) order[i] = i;
  uint64_t random = uint64_t(setting("CONVFAST_EMULATE_SEED", 0)) * 2 + 1;
  for (size_t i = groups; i-- > 1;) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    std::swap(order[i], order[(random >> 33) % (i + 1)]);
  }
  for (const size_t g : order) {
    Group group;
    group.name = name;
    group.kernel = [&] { kernel(params); };
    for (size_t i = g * of_group; i < (g + 1) * of_group; ++i)
      group.add_block(dim3(i % grid.x, i / grid.x % grid.y, i / (size_t(grid.x) * grid.y)), grid, size, shared_bytes);
    group.run();
  }
}

}  // namespace simt
}  // namespace convfast

#define threadIdx (::convfast::simt::self().thread)
#define blockIdx (::convfast::simt::self().block->index)
#define blockDim (::convfast::simt::self().block->size)
#define gridDim (::convfast::simt::self().block->grid)

inline void __syncthreads() { convfast::simt::arrive_and_wait(convfast::simt::self().block->barrier); }
inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  convfast::simt::meet("__syncwarp", mask, nothing, [](int**) {});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int first = int(convfast::simt::self().lane()) / width * width;
  struct Value {
    T in, out;
    int from;
  } mine{value, value, first + lane % width};
  convfast::simt::meet("__shfl_sync", mask, mine, [](Value** all) {
    for (int i = 0; i < 32; ++i)
      if (all[i] && all[all[i]->from]) all[i]->out = all[all[i]->from]->in;
  });
  return mine.out;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return convfast::simt::shuffle<T>("__shfl_xor_sync", mask, value, [=](int i) { return (i ^ lanes) / width <= i / width ? i ^ lanes : -1; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  return convfast::simt::shuffle<T>("__shfl_down_sync", mask, value, [=](int i) { return (i + delta) / width == i / width ? i + delta : -1; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  return convfast::simt::shuffle<T>("__shfl_up_sync", mask, value, [=](int i) { return i % width >= delta ? i - delta : -1; });
}

inline float __expf(float x) { return exp2f(x * 1.44269504f); }
inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f && fabsf(b) < INFINITY ? 0.f : a / b; }
template <class To, class From>
To convfast_bits(From from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return convfast_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return convfast_bits<unsigned>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
using std::max;
using std::min;
