#include "workspace.h"

#include <pthread.h>
#include <strings.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace convfast {
namespace cpu {
namespace {

// Past this much idle memory the least recently used buffers are freed.
constexpr size_t kMostIdle = size_t(1) << 30;
constexpr size_t kHugePage = size_t(1) << 21;
// An idle buffer is taken where no more than this, or a quarter, of it would lie idle again.
constexpr size_t kSlack = size_t(1) << 17;

struct Pool {
  std::mutex mutex;
  std::vector<std::pair<void*, size_t>> idle;  // oldest first
  size_t idle_bytes = 0;
};

// Never destroyed: threads may outlive static destruction.
Pool& pool() {
  static Pool* p = [] {
    pthread_atfork([] { pool().mutex.lock(); }, [] { pool().mutex.unlock(); }, [] { pool().mutex.unlock(); });
    return new Pool;
  }();
  return *p;
}

}  // namespace

std::pair<void*, size_t> borrow(size_t bytes) {
  const size_t unit = bytes >= kHugePage ? kHugePage : 4096;
  bytes = (bytes + unit - 1) / unit * unit;
  Pool& p = pool();
  std::pair<void*, size_t> buffer{nullptr, bytes};
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.idle.size();
    for (size_t i = 0; i < p.idle.size(); ++i) {
      const size_t size = p.idle[i].second;
      if (size >= bytes && size <= bytes + std::max(bytes / 4, kSlack) && (best == p.idle.size() || size < p.idle[best].second)) best = i;
    }
    if (best != p.idle.size()) {
      buffer = p.idle[best];
      p.idle_bytes -= buffer.second;
      p.idle.erase(p.idle.begin() + best);
    }
  }
  if (!buffer.first) {
    int error = posix_memalign(&buffer.first, unit, bytes);
    if (error) {
      release_workspace();  // what lies idle may be what is missing
      error = posix_memalign(&buffer.first, unit, bytes);
    }
    STD_TORCH_CHECK(error == 0, "convfast: cannot allocate ", bytes, " bytes of memory");
#if defined(MADV_HUGEPAGE)
    if (unit == kHugePage) madvise(buffer.first, bytes, MADV_HUGEPAGE);  // a hint: failure is no error
#endif
  }
  if (poison_requested()) poison(buffer.first, buffer.second);
  return buffer;
}

void give_back(void* data, size_t bytes) {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  try {
    p.idle.emplace_back(data, bytes);
  } catch (const std::bad_alloc&) {  // destructors call this
    return free(data);
  }
  p.idle_bytes += bytes;
  while (p.idle_bytes > kMostIdle) {
    p.idle_bytes -= p.idle.front().second;
    free(p.idle.front().first);
    p.idle.erase(p.idle.begin());
  }
}

void* Workspace::take_bytes(size_t bytes) {
  taken_.push_back(borrow(bytes));
  return taken_.back().first;
}

Workspace::~Workspace() {
  for (const auto& [data, bytes] : taken_) give_back(data, bytes);
}

void release_workspace() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (const auto& buffer : p.idle) free(buffer.first);
  p.idle.clear();
  p.idle_bytes = 0;
}

bool poison_requested() {
  static const bool requested = [] {
    const char* value = std::getenv("CONVFAST_POISON");
    if (!value) return false;
    for (const char* off : {"", "0", "false", "off", "no"}) {  // as in convfast/environment.py
      if (strcasecmp(value, off) == 0) return false;
    }
    return true;
  }();
  return requested;
}

void poison(void* data, size_t bytes) { std::memset(data, 0xff, bytes); }  // a NaN in every floating dtype

}  // namespace cpu
}  // namespace convfast

STABLE_TORCH_LIBRARY_IMPL(convfast, CompositeExplicitAutograd, m) {
  m.impl("release_workspace", TORCH_BOX(&convfast::cpu::release_workspace));
}
