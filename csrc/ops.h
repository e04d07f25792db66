// The contract of every op: shape, role and layout of each tensor, and what is saved for backward.
//
// Letters: B batch, T time, C hidden channels, Cin input channels, *S spatial dims of the input (1 to 3 of
// them), *S' spatial dims of the state, *K kernel dims. Gates are ordered i f g o along every 4C axis.
// "channels-last" is a logical [B, T, C, *S'] whose memory is [B, T, *S', C] (stride 1 on C).
// dtypes: A = activations and weights (float, double, bfloat16, half); A' = float for A narrower than float,
// else A. Gate arithmetic and cell state are A', saved gates are A. (The reference saves all in A'.)
// Schemas, registered in library.cpp:
//
// lstm_gates_forward(gates, c, peephole, save) -> (h, c_out, activated)
//   gates     [B, 4C, *S]    pre-activations, A; channels-first or channels-last, any other layout is copied
//   c         [B, C, *S]     A or A'; undefined = zero
//   peephole  [3, C, *S]     A; i f o; undefined = none
//   save      bool           false: activated is an empty tensor
//   -> h      [B, C, *S]     A, in the layout of gates
//      c_out  [B, C, *S]     A', same layout
//      activated [B, 4C, *S] A, same layout
//
// lstm_gates_backward(activated, c, c_out, peephole, dh, dc_out, needs) -> (dgates, dc, dpeephole)
//   activated, c, c_out, peephole   as above; dh, dc_out undefined = zero
//   needs     int[3]         which of dgates, dc, dpeephole are wanted; others come back empty
//   -> dgates in A, dc in A', dpeephole [3, C, *S] in dtype of peephole
//
// conv_lstm_forward(x, w_ih, w_hh, bias, peephole, h0, c0, lengths, time, stride, padding, dilation,
//                   padding_mode, reverse, algorithm, save) -> (h, h_n, c_n, c, gates)
//   x         [B, T, Cin, *S]   A, any strides; undefined = no input (decoder; then c0 or h0 gives B and *S')
//             [B, T, 4C, *S']   when w_ih is undefined: the input convolution, already computed, without bias
//   w_ih      [4C, Cin, *K]     A; input-to-hidden
//   w_hh      [4C, C, *K']      A; hidden-to-hidden: stride 1, zeros, "same" (d(k-1)/2 before, the rest behind)
//   bias      [4C]              A; undefined = zero
//   peephole  [3, C, *S']       A; i and f look at c[t-1], o at c[t]; undefined = none
//   h0        [B, C, *S']       A;       undefined = zero, and its convolution is skipped
//   c0        [B, C, *S']       A or A'; undefined = zero
//   lengths   [B]               int64, 0..T; undefined = T for all. Step s of sample b reads frame s, or frame
//                               lengths[b]-1-s when reverse; steps past the length are not run and h is zero there
//   time      int               T
//   stride, dilation int[n]; padding int[2n] (before, behind, of each dim), of the input convolution
//   padding_mode  "zeros" | "reflect" | "replicate" | "circular"
//   reverse   bool              last frame first
//   algorithm "auto" | "direct" | "winograd"   how convolutions are computed; what is saved does not depend on it
//   save      "none" | "fast" | "lean"
//   -> h      [B, T, C, *S']    A, channels-last; h at the previous step is the recurrent input
//      h_n    [B, C, *S']       A, channels-last; state after each sample's last step (h0 when its length is 0)
//      c_n    [B, C, *S']       A', channels-last
//      c      [B, T, C, *S']    A', channels-last; empty when save == none. Frames past a length are undefined
//      gates  [B, T, 4C, *S']   A, channels-last, activated; empty unless save == fast
//   Which step frame s of c and gates belongs to, and the order of a pixel's gates, are the backend's own affair; they only ever go back
//   to its backward.
//   Bytes per step kept for backward, in units of B*C*prod(S'): fast 5 sizeof(A) + sizeof(A'), lean sizeof(A) + sizeof(A').
//
// conv_lstm_backward(dh, dh_n, dc_n, x, w_ih, w_hh, bias, peephole, h0, c0, lengths, h, c, gates, time, stride,
//                    padding, dilation, padding_mode, reverse, algorithm, needs)
//     -> (dx, dw_ih, dw_hh, dbias, dpeephole, dh0, dc0)
//   dh [B, T, C, *S'], dh_n, dc_n [B, C, *S']   any strides; undefined = zero. Never written to
//   h, c, gates   as the forward returned them; gates empty (lean): recomputed from h, c and the inputs
//   needs     int[7]             which of the seven gradients are wanted; others come back empty
//   -> each gradient in its tensor's shape; dtype of its tensor (dc0: of c0). dx in x's own
//      layout where x is dense, as empty_like(x)
//
// conv_lstm_algorithm(x, w_ih, w_hh, h0, c0, time, stride, padding, dilation, padding_mode, algorithm) -> str
//   what the two ops above take for these shapes: "winograd F(m x m, r x r)", with the pieces of the kernel if
//   there are several, or "direct: " and the reason
//
// conv1d_forward(x, weight, bias, lengths, stride, padding, dilation, groups, padding_mode, activation, time_major, save)
//     -> (y, pre)
//   x         [B, T, F]      A, any strides
//   weight    [C, F/groups, k] A; bias [C] A, undefined = zero
//   lengths   [B]            int64, 0..T; undefined = T. Sample b is x[b, :lengths[b]]: padding starts at its own end, and y is
//                            zero past its own output length
//   stride, dilation, groups int; padding int[2] (before, behind)
//   padding_mode  as above
//   activation "none" | "relu" | "tanh" | "sigmoid" | "gelu" | "silu" | "leaky_relu"   (gelu by erf, leaky_relu with slope 0.01)
//   time_major bool          memory of y: [T', B, C], else [B, T', C]
//   save      bool           keep what the backward needs beside y
//   -> y      [B, T', C]     A; T' = (T + padding - dilation (k-1) - 1) / stride + 1
//      pre    [B, T', C]     A, memory like y: pre-activations, where save and the gradient needs them (gelu, silu); else empty
//
// conv1d_backward(dy, x, weight, bias, lengths, y, pre, stride, padding, dilation, groups, padding_mode, activation, needs)
//     -> (dx, dweight, dbias)
//   y         read for relu, tanh, sigmoid and leaky_relu only; else of the right shape and no more
//   needs     int[3]         as above. dx in x's own layout where x is dense, as empty_like(x)
//
// lstm_forward(x, w_ih, w_hh, bias, peephole, w_hr, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r, h0, c0, lengths, time_major,
//              save) -> (y, h_n, c_n, c, gates)
//   H hidden size, I input size, P size of h: that of the projection, else H; D directions: 2 where w_hh_r is defined
//   x         [B, T, I]      A, any strides
//   w_ih      [4H, I], w_hh [4H, P], bias [4H], peephole [3, H], w_hr [P, H]   A; all but w_ih and w_hh may be undefined.
//                            h = w_hr (o tanh(c')) where w_hr is defined. ..._r of the reverse direction
//   h0, c0    [D, B, P], [D, B, H]   A; c0 also A'; undefined = zero
//   lengths   [B]            int64, 0..T; undefined = T. As in conv_lstm; y is zero past a length
//   time_major bool          memory of y: [T, B, D P], else [B, T, D P]
//   save      bool
//   -> y      [B, T, D P]    A; direction d in columns d P ...
//      h_n    [D, B, P]      A; c_n [D, B, H] A'
//      c      [D, B, T, H]   A', gates [D, B, T, 4H] A: what the same backend's backward reads, in an order of its own;
//                            empty unless save. Bytes per step: B H (4 sizeof(A) + sizeof(A')) + y
//
// lstm_layers(x, weights, peepholes, bias, projection, bidirectional, h0, c0, lengths, head, head_bias, time_major)
//     -> (y, h_n, c_n)
//   lstm_forward without saving, layer after layer, L of them
//   weights   of each layer and direction in turn: w_ih, w_hh, with `bias` also b_ih and b_hh [4H], with `projection` also
//             w_hr. From the second layer on w_ih is [4H, D P]
//   peepholes one of each layer and direction, or none
//   h0, h_n   [L D, B, P]; c0, c_n [L D, B, H]
//   head      [O, D P]       A, head_bias [O]; where defined y is head h + head_bias, [B, T, O]
//
// conv1d_lstm_layers(x, convolutions, conv_bias, stride, padding, dilation, groups, padding_mode, activation,
//                    weights, peepholes, bias, projection, bidirectional, h0, c0, head, head_bias, time_major) -> (y, h_n, c_n)
//   conv1d_forward without saving, one after another, and lstm_layers on top
//   convolutions  of each: weight, with `conv_bias` also bias
//   stride, dilation, groups int[number of convolutions]; padding int[2 of each]; padding_mode, activation of all
//
// lstm_backward(dy, dh_n, dc_n, x, w_ih, w_hh, bias, peephole, w_hr, w_ih_r, w_hh_r, bias_r, peephole_r, w_hr_r, h0, c0,
//               lengths, y, c, gates, needs)
//     -> (dx, dw_ih, dw_hh, dbias, dpeephole, dw_hr, dw_ih_r, dw_hh_r, dbias_r, dpeephole_r, dw_hr_r, dh0, dc0)
//   dy, dh_n, dc_n   any strides; undefined = zero
//   needs     int[13]        as above
#pragma once
