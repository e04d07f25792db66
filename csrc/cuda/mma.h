// Tensor cores, asynchronous copies into shared memory, clusters and the barrier of a cooperative grid, for sm_80 on (clusters: sm_90;
// products of warpgroups: sm_90a).
//
// Fragments of mma, g = lane / 4 and q = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"): a[0] holds row g, columns 2q and
// 2q + 1; a[1] row g + 8; a[2], a[3] the same 8 columns on. b[0] holds rows 2q, 2q + 1 of column g; b[1] 8 rows on. d[0], d[1] are
// row g, columns 2q, 2q + 1; d[2], d[3] row g + 8. With tf32 a word is one element: a[0] is row g, column q; a[1] row g + 8; a[2],
// a[3] 4 columns on; b[0] is row q of column g, b[1] 4 rows on.
#pragma once
#include "device.h"

namespace convfast {
namespace cuda {

// Byte offset of 16-byte chunk j of row r in a tile of rows of 64 bytes: eight rows at one j lie in eight groups of banks.
inline __host__ __device__ int swizzled(int r, int j) { return r * 64 + ((j ^ (r >> 1 & 3)) << 4); }

#ifdef CONVFAST_EMULATE

inline void cp_async16(void* shared, const void* global, bool valid = true) { simt::copy_async(shared, global, 16, valid); }
inline void cp_async16_again(void* shared, const void* global, bool valid = true) { simt::copy_async(shared, global, 16, valid); }
inline void cp_async8(void* shared, const void* global, bool valid = true) { simt::copy_async(shared, global, 8, valid); }
inline void cp_async4(void* shared, const void* global, bool valid = true) { simt::copy_async(shared, global, 4, valid); }
inline void cp_async_commit() { simt::copy_commit(); }
template <int N>
void cp_async_wait() {
  simt::copy_wait(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared) { simt::load_matrices<4>(r, shared, false); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) { simt::load_matrices<4>(r, shared, true); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared) { simt::load_matrices<2>(r, shared, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) { simt::load_matrices<2>(r, shared, true); }

template <class A>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::multiply<16, 4>("mma.m16n8k16", d, a, b, [](uint32_t word, int part) { return part ? unpack<A>(word).y : unpack<A>(word).x; });
}
// The tensor core reads 19 bits of each word.
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::multiply<8, 4>("mma.m16n8k8", d, a, b, [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
}
inline uint32_t to_tf32(float x) { return (__float_as_uint(x) + 0x1000) & 0xffffe000u; }

using Matrix = const char*;
inline Matrix matrix_at(const void* shared) { return static_cast<const char*>(shared); }
template <class A, int WN, int PG>
void wgmma(float (&d)[WN][PG][4], Matrix a, Matrix b) {
  simt::multiply_async(&d[0][0][0], WN * PG * 8, a, b, [](uint16_t bits) { return to_float(A(bits, A::from_bits())); });
}
template <int WN, int PG>
void hold(float (&)[WN][PG][4]) {}
inline void wgmma_fence() {}
inline void wgmma_commit() { simt::multiply_commit(); }
template <int N>
void wgmma_wait() {
  simt::multiply_wait(N);
}
inline void fence_async_proxy() {}

inline unsigned cluster_rank() { return simt::self().block->rank; }
inline unsigned cluster_size() { return unsigned(simt::self().block->group->blocks.size()); }
inline void cluster_sync() { simt::arrive_and_wait(simt::self().block->group->everyone); }
inline void cluster_arrive() {
  simt::self().cluster_phase = simt::self().block->group->everyone.phase;
  simt::arrive(simt::self().block->group->everyone);
}
inline void cluster_wait() { simt::wait(simt::self().block->group->everyone, simt::self().cluster_phase); }
template <class T>
T* cluster_map(T* shared, unsigned rank) {
  const simt::Block& mine = *simt::self().block;
  simt::check_shared("cluster_map", shared, alignof(T));
  if (rank >= cluster_size()) simt::fail("cluster_map: no such rank");
  return reinterpret_cast<T*>(mine.group->blocks[rank]->memory.get() + (reinterpret_cast<const char*>(shared) - mine.memory.get()));
}
inline void grid_sync() { simt::arrive_and_wait(simt::self().block->group->everyone); }

#else

CONVFAST_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies into shared memory that land by the matching cp_async_wait; zeros where not valid (global is then not read, but is still
// a pointer aligned like any other). Both pointers are aligned to the size.
CONVFAST_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// By way of L1: what the block reads again soon.
CONVFAST_DEVICE void cp_async16_again(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
CONVFAST_DEVICE void cp_async8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 8 : 0) : "memory");
}
CONVFAST_DEVICE void cp_async4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid ? 4 : 0) : "memory");
}
CONVFAST_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of the thread's last committed groups are under way. Other threads see what landed after a barrier.
template <int N>
CONVFAST_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 8 x 8 matrices of 16-bit elements; lane 8 m + r gives the address of row r (16 bytes) of matrix m.
CONVFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
CONVFAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared))
               : "memory");
}
CONVFAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(shared)) : "memory");
}
CONVFAST_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared))
               : "memory");
}

// d += a b, accumulated in float32.
template <class A>
CONVFAST_DEVICE void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<A, Half>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
CONVFAST_DEVICE void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// To the nearest tf32, ties away from zero.
CONVFAST_DEVICE uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

// A warpgroup is four neighbouring warps from a multiple of four on, and all its threads come here. d [64, 8 WN PG] += a [64, 16] bᵀ, b
// [8 WN PG, 16], in float; the tensor cores read both from shared memory while the threads go on. The w-th warp has rows 16 w ... 16 w + 15,
// d[i][j] is the 16 x 8 tile of columns 8 (i PG + j) on, as mma_16816 has it.
//
// Operands are 64 bytes a row, chunks of 16 bytes where `swizzled` has them, from a multiple of 512 bytes on, or 32 bytes (16 of K)
// behind it. Descriptor: PTX ISA, "Matrix descriptor format": address and strides in units of 16 bytes, 8 rows to the next 8 512
// bytes; 2 is the swizzle of 64 bytes.
using Matrix = uint64_t;
CONVFAST_DEVICE Matrix matrix_at(const void* shared) {
  return uint64_t(shared_address(shared) >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(512 >> 4) << 32 | uint64_t(2) << 62;
}
// No use of the sums, by which they are waited for, moves past this.
template <int WN, int PG>
CONVFAST_DEVICE void hold(float (&d)[WN][PG][4]) {
#pragma unroll
  for (int i = 0; i < WN; ++i)
#pragma unroll
    for (int j = 0; j < PG; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) asm volatile("" : "+f"(d[i][j][k])::"memory");
}
// Between what threads do with the sums and products.
CONVFAST_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
CONVFAST_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N of the last committed groups are under way. Sums may be looked at when none is.
template <int N>
CONVFAST_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// What this thread wrote to shared memory, or waited for, wgmma sees after a barrier behind this.
CONVFAST_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

#define CONVFAST_FOUR(i, j) "+f"(d[i][j][0]), "+f"(d[i][j][1]), "+f"(d[i][j][2]), "+f"(d[i][j][3])
#define CONVFAST_32(i, j)                                                                                                          \
  CONVFAST_FOUR(i, j), CONVFAST_FOUR(i, j + 1), CONVFAST_FOUR(i, j + 2), CONVFAST_FOUR(i, j + 3), CONVFAST_FOUR(i, j + 4),        \
      CONVFAST_FOUR(i, j + 5), CONVFAST_FOUR(i, j + 6), CONVFAST_FOUR(i, j + 7)
#define CONVFAST_WGMMA(shape, type, registers, a_at, b_at)                                                                         \
  "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" registers "}, " a_at  \
  ", " b_at ", p, 1, 1, 0, 0;\n}\n"
#define CONVFAST_R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define CONVFAST_R64 CONVFAST_R32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define CONVFAST_R128 CONVFAST_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define CONVFAST_BY_TYPE(shape, registers, a_at, b_at, ...)                                                          \
  if constexpr (std::is_same_v<A, Half>)                                                                             \
    asm volatile(CONVFAST_WGMMA(shape, "f16", registers, a_at, b_at) : __VA_ARGS__ : "l"(a), "l"(b) : "memory");     \
  else                                                                                                               \
    asm volatile(CONVFAST_WGMMA(shape, "bf16", registers, a_at, b_at) : __VA_ARGS__ : "l"(a), "l"(b) : "memory")

template <class A, int WN, int PG>
CONVFAST_DEVICE void wgmma(float (&d)[WN][PG][4], Matrix a, Matrix b) {
  static_assert(WN <= 2 && (PG == 8 || PG == 16), "64, 128 or 256 columns");
  if constexpr (kHasWarpgroups) {
    if constexpr (WN * PG == 32) {
      CONVFAST_BY_TYPE("m64n256k16", CONVFAST_R128, "%128", "%129", CONVFAST_32(0, 0), CONVFAST_32(0, 8), CONVFAST_32(1, 0), CONVFAST_32(1, 8));
    } else if constexpr (PG == 16) {
      CONVFAST_BY_TYPE("m64n128k16", CONVFAST_R64, "%64", "%65", CONVFAST_32(0, 0), CONVFAST_32(0, 8));
    } else if constexpr (WN == 2) {
      CONVFAST_BY_TYPE("m64n128k16", CONVFAST_R64, "%64", "%65", CONVFAST_32(0, 0), CONVFAST_32(1, 0));
    } else {
      CONVFAST_BY_TYPE("m64n64k16", CONVFAST_R32, "%32", "%33", CONVFAST_32(0, 0));
    }
  }
}
#undef CONVFAST_FOUR
#undef CONVFAST_32
#undef CONVFAST_WGMMA
#undef CONVFAST_R32
#undef CONVFAST_R64
#undef CONVFAST_R128
#undef CONVFAST_BY_TYPE

// Of blocks launched by launch_cluster. A block's shared memory is there while it runs: a cluster_sync comes before the end where
// others read it. Arrive releases what was written before it, wait acquires it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
CONVFAST_DEVICE unsigned cluster_rank() {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
CONVFAST_DEVICE unsigned cluster_size() {
  unsigned r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
CONVFAST_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
CONVFAST_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <class T>
CONVFAST_DEVICE T* cluster_map(T* shared, unsigned rank) {
  uint64_t r;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(r) : "l"(reinterpret_cast<uint64_t>(shared)), "r"(rank));
  return reinterpret_cast<T*>(r);
}
#else
// Kernels for clusters compile for older architectures too, and are never launched there.
CONVFAST_DEVICE unsigned cluster_rank() { return 0; }
CONVFAST_DEVICE unsigned cluster_size() { return 1; }
CONVFAST_DEVICE void cluster_arrive() {}
CONVFAST_DEVICE void cluster_wait() {}
template <class T>
CONVFAST_DEVICE T* cluster_map(T* shared, unsigned) {
  return shared;
}
#endif
CONVFAST_DEVICE void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
// Of all blocks of launch_cooperative; what was written before it is seen after it.
CONVFAST_DEVICE void grid_sync() { cooperative_groups::this_grid().sync(); }

#endif

}  // namespace cuda
}  // namespace convfast
