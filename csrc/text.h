// A string argument of an op. torch's own conversion to std::string (2.10 to 2.15) never frees one of the two that it
// makes: a service would lose a hundred bytes a call.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace convfast {

struct Text : std::string {
  using std::string::string;
};

}  // namespace convfast

template <>
struct torch::stable::detail::ToImpl<convfast::Text> {
  static convfast::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = torch::stable::detail::to<StringHandle>(value);
    const struct Owner {
      StringHandle handle;
      ~Owner() { torch_delete_string(handle); }
    } owner{handle};
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    return convfast::Text(data, length);
  }
};
