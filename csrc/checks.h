// What must hold before a kernel runs. Python has checked the arguments already; these checks keep a wrong call from
// touching memory that is not its own.
#pragma once

#include <string>
#include <vector>

#include "layalign.h"

namespace layalign {

// Throws Error("<operation>: <argument>: <what was expected>").
[[noreturn]] void fail(const char* operation, const char* argument, const std::string& expected);

// One tensor on its own: no negative sizes or strides, memory where there are elements.
void check_tensor(const char* operation, const char* name, const Tensor& tensor);

void check(const LayerMixForward& call);
void check(const LayerMixBackward& call, int64_t workspace);
void check(const PackWeight& call, int threads);
void check(const LayerProjectionForward& call, size_t outs, int threads);
void check(const LayerProjectionBackward& call, size_t grads, int threads);
void check(const BatchedLinear& call, int threads);
void check(const AttentionForward& call);
void check(const AttentionDecode& call, int64_t workspace);
void check(const AttentionBackward& call, int64_t workspace);

// Elements of fp32 workspace that a call needs on a device; device -1 is the CPU.
int64_t mix_workspace(const LayerMixBackward& call, int device);
int64_t decode_workspace(const AttentionDecode& call, int device);
int64_t backward_workspace(const AttentionBackward& call, int device);

}  // namespace layalign
