// Tensor cores, asynchronous copies into shared memory, clusters and the barrier of a cooperative grid, for sm_80 on (clusters: sm_90).
//
// Fragments of mma, g = lane / 4 and q = lane % 4 (PTX ISA, "Matrix fragments for mma.m16n8k16"): a[0] holds row g, columns 2q and
// 2q + 1; a[1] row g + 8; a[2], a[3] the same 8 columns on. b[0] holds rows 2q, 2q + 1 of column g; b[1] 8 rows on. d[0], d[1] are
// row g, columns 2q, 2q + 1; d[2], d[3] row g + 8. With tf32 a word is one element: a[0] is row g, column q; a[1] row g + 8; a[2],
// a[3] 4 columns on; b[0] is row q of column g, b[1] 4 rows on.
#pragma once
#include "device.h"

namespace convfast {
namespace cuda {

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
