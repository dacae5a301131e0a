// y = x W^T on Hopper, W in 4 bits: tensor cores fed from codes that stay packed.
//
// One warp copies (bulk copies of the copy engine, into a ring of STAGES stages), the others compute.
// A stage holds 128 inputs: codes and scales of 128 rows, and x of N tokens. A lane's codes are a
// vector of 16 bytes (fragments.py, blocked), and unpacking gives it the left operand of an
// instruction in registers: no value moves between threads. The ring is filled with weights before
// the kernel in front of this one has ended.
//
// The inputs of 128 rows and N tokens are divided among the programs of a cluster, and so is adding
// their sums up: each has a few warps next to each other whose sums are sent to it, and adds them in
// order. RESIDENT programs fit on a processor.
//
// FEW tokens: reading takes the time. A program is eight warps of 16 rows each.
//
// More tokens: multiplying takes the time. A program is two warpgroups of 64 rows each (wgmma): while
// one unpacks, the other multiplies, and each unpacks what it multiplies next while it multiplies.
//
// hopper.py defines, in front of this text:
//   N        tokens of a program: 8 or 16 with FEW, else up to 256
//   FEW      see above
//   STAGES   of the ring
//   RESIDENT programs that shall fit on a processor at once
//   STEP     inputs that share a scale, as far as this kernel sees: 32, 64 or 128
//   BFLOAT   x, bias and out are bfloat16, not float16
//   SCALE    a scale is 2: float16, 3: bfloat16, 4: float32
//   ZEROS    whether groups have zero points (float16: middle - zero), or all of them MIDDLE
//   WGMMA    (sums, a, b): the instruction, for N

typedef unsigned int u32;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__
// Codes less their zero point are small whole numbers, of which no product is rounded: sums are scaled, once
// a group. Multiplying takes the time with many tokens, and has to wait for that. Weights are scaled there,
// and rounded to float16, unless that could lose more than the result does: bfloat16 has fewer digits, and
// other scales may be too small for float16.
#define EXACT (BFLOAT || N <= 64 || SCALE != 2)
#define ROWS 128                                    // of a program: a block of fragments
#define WARPS (ROWS / 16)                           // that compute, 16 rows each
#define COPYING (FEW ? 32 : 128)                    // threads, of which a warp has something to do
#define THREADS (32 * WARPS + COPYING)
#define GIVEN (65536 / (THREADS * RESIDENT) / 8 * 8)        // registers of a thread, when it begins
#define COPIES_WITH (RESIDENT == 1 ? 40 : 32)
#define COMPUTES_WITH ((GIVEN * THREADS - COPIES_WITH * COPYING) / (32 * WARPS) / 8 * 8)
#define WORDS_BYTES (ROWS * 64)                     // of a stage: codes, scales, zero points
#define SCALE_BYTES ((SCALE == 4 ? 4 : 2) * ROWS * (128 / STEP))
#define ZERO_BYTES (ZEROS * 2 * ROWS * (128 / STEP))
#define X_BYTES (N * 256)                           // the ring: x of all stages, then their weights
#define SCALE_AT WORDS_BYTES
#define ZERO_AT (SCALE_AT + SCALE_BYTES)
#define WEIGHT_BYTES (ZERO_AT + ZERO_BYTES)
#define RING_BYTES (STAGES * (X_BYTES + WEIGHT_BYTES))
#define TURNED_BYTES 2048                           // of a warpgroup: 16 tokens of 64 rows, twice
#define SENT_BYTES (N / 8 * 512)                    // sums of a warp
#define CHUNKS (WARPS / 2)                          // warps whose sums a program of a cluster adds up, at most
#define BATCH (STEP < 64 ? STEP : 64)               // inputs that a warpgroup unpacks at a time

struct __align__(64) Map { char held[128]; };       // CUtensorMap

INLINE u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Barriers of the ring

INLINE void prepare(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
INLINE void expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
INLINE void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
INLINE void await(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}" ::"r"(barrier), "r"(parity) : "memory");
}

// Copies

INLINE void copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
INLINE void copy_x(u32 to, const Map* map, int token, int half, u32 barrier) {  // 64 inputs, twice
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
      ::"r"(to), "l"(map), "r"(0), "r"(token), "r"(half), "r"(barrier) : "memory");
}

// Numbers

INLINE u32 pair(float first, float second) {
  u32 found;
#if BFLOAT
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(second), "f"(first));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(found) : "f"(second), "f"(first));
#endif
  return found;
}
INLINE u32 twice(float x) { return pair(x, x); }
INLINE float half_number(u32 x) {
  float found;
  asm("cvt.f32.f16 %0, %1;" : "=f"(found) : "h"((unsigned short)x));
  return found;
}
INLINE float bfloat_number(u32 x) { return __uint_as_float(x << 16); }
INLINE u32 minus(u32 a, u32 b) {
  u32 found;
#if BFLOAT
  asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
#else
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
#endif
  return found;
}
INLINE u32 times(u32 a, u32 b) {                    // of float16
  u32 found;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(found) : "r"(a), "r"(b));
  return found;
}
INLINE u32 times_plus(u32 a, u32 b, u32 c) {        // of float16
  u32 found;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(c));
  return found;
}

// Codes

struct Row {                                        // what a row's codes are turned into numbers with
  u32 low, high;                                    // what unpacked pairs have too much
  u32 scale;                                        // with EXACT 0
};

INLINE u32 weighed(u32 x, const Row& row) { return EXACT ? x : times(x, row.scale); }
template <u32 MASK, u32 ONE> INLINE u32 masked(u32 q) {
  u32 found;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(found) : "r"(q), "n"(MASK), "n"(ONE));
  return found;
}
// A word of eight codes: four pairs of neighbours. An exponent that makes the last bit of a mantissa
// worth 1 (or 1/16) takes a code as it is.
INLINE void unpack(u32 q, const Row& row, u32 (&pairs)[4]) {
#if BFLOAT
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = minus(masked<0x000f000f, 0x43004300>(q >> 4 * i), row.low);
#else
  const u32 sixteenth = 0x2c002c00;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 s = q >> 4 * i;
    pairs[i] = weighed(minus(masked<0x000f000f, 0x64006400>(s), row.low), row);
    pairs[i + 1] = weighed(times_plus(masked<0x00f000f0, 0x64006400>(s), sixteenth, row.high), row);
  }
#endif
}
// Scales and zero points of a lane's two rows
INLINE void read_rows(const char* weights, int warp, int g, int group, Row (&rows)[2], float (&scales)[2]) {
  const int place = ((group * 4 + warp / 2) * 8 + g) * 4 + warp % 2 * 2;
#if SCALE == 4
  const float2 found = *(const float2*)(weights + SCALE_AT + place * 4);
  scales[0] = found.x, scales[1] = found.y;
#else
  const u32 found = *(const u32*)(weights + SCALE_AT + place * 2);
  scales[0] = SCALE == 3 ? bfloat_number(found & 0xffff) : half_number(found & 0xffff);
  scales[1] = SCALE == 3 ? bfloat_number(found >> 16) : half_number(found >> 16);
#endif
  float zeros[2] = {MIDDLE, MIDDLE};
#if ZEROS
  const u32 moved = *(const u32*)(weights + ZERO_AT + place * 2);
  zeros[0] -= half_number(moved & 0xffff), zeros[1] -= half_number(moved >> 16);
#endif
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    rows[i].low = twice((BFLOAT ? 128.0f : 1024.0f) + zeros[i]), rows[i].high = twice(-64.0f - zeros[i]);
    rows[i].scale = twice(scales[i]);
  }
}
INLINE uint2 words_of(u32 weights, int warp, int lane, int inputs) {  // 32 lanes for 32 inputs
  const u32 at = weights + warp / 2 * (WORDS_BYTES / 4) + inputs / 32 * 512 + lane * 16 + warp % 2 * 8;
  uint2 q;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(q.x), "=r"(q.y) : "r"(at) : "memory");
  return q;
}

// Where the inputs of a stage are multiplied. Sums of 16 rows lie as both instructions have them: lane
// 4 g + t has the tokens 8 j + 2 t and the one behind, of row g in 4 j and 4 j + 1, of row g + 8 in
// 4 j + 2 and 4 j + 3.

#if FEW

INLINE void multiply(float* sums, const u32 (&a)[4], u32 b0, u32 b1) {
#if BFLOAT
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE void compute(u32 x, const char* weights, int warp, int lane, float (&sums)[N / 2]) {
  x += lane % 8 * 128;                              // a row of 128 bytes, its eighths swizzled
#pragma unroll
  for (int from = 0; from < 128; from += STEP) {
    Row rows[2];
    float scales[2], found[2][N / 2];               // two chains: neither waits for the other
    read_rows(weights, warp, lane / 4, from / STEP, rows, scales);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) found[0][i] = found[1][i] = 0.0f;
#pragma unroll
    for (int k = from; k < from + STEP; k += 32) {
      const uint2 q = words_of(shared(weights), warp, lane, k);
      u32 upper[4], lower[4], b[N / 8][4];
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        const u32 at = x + k / 64 * (N * 128) + n * 1024 + ((k % 64 / 8 + lane / 8) ^ (lane % 8)) * 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(b[n][0]), "=r"(b[n][1]), "=r"(b[n][2]), "=r"(b[n][3]) : "r"(at) : "memory");
      }
      unpack(q.x, rows[0], upper), unpack(q.y, rows[1], lower);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const u32 a[4] = {upper[2 * j], lower[2 * j], upper[2 * j + 1], lower[2 * j + 1]};
#pragma unroll
        for (int n = 0; n < N / 8; ++n) multiply(found[j] + 4 * n, a, b[n][2 * j], b[n][2 * j + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[i] = fmaf(found[0][i] + found[1][i], scales[(i & 2) / 2], sums[i]);
  }
}

#else

// Waits until no more than so many batches are being multiplied
template <int BATCHES> INLINE void multiplied() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(BATCHES) : "memory");
}
template <int COUNT> INLINE void hold(u32 (&a)[COUNT][4]) {  // in registers, up to here
#pragma unroll
  for (int i = 0; i < COUNT * 4; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}
INLINE void hold(float (&sums)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}
// x of N tokens and 16 inputs in shared memory: rows of 128 bytes, swizzled by the copy engine
INLINE u64 operand(u32 at) { return 0x4000004000010000ull | (u64)((at & 0x3ffff) >> 4); }

// Sums are kept in units of the scale of the group that was added last: one set of registers does. A
// scale of 0 or nearly so counts as a number that small, whose sums vanish beside all others.
INLINE float unit(float scale) { return fabsf(scale) < 0x1p-80f ? 0x1p-80f : scale; }
INLINE void change_unit(float (&sums)[N / 2], float upper, float lower) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) sums[i] *= i & 2 ? lower : upper;
}
typedef u32 Batch[BATCH / 16][4];                   // left operands
// While a batch is multiplied, the next one is unpacked, and queued behind it unless sums are scaled. The
// barrier ``before`` is told that the stage before is not needed any more, if there is one.
INLINE void compute(u32 x, const char* weights, int warp, int lane, float (&sums)[N / 2], float (&units)[2],
                    Batch (&batches)[2], bool first, u32 before) {
  Row rows[2];                                      // warp w of a warpgroup has its rows 16 w to 16 w + 15
  float scales[2];
#pragma unroll
  for (int from = 0; from < 128; from += BATCH) {
    const bool begins = from % STEP == 0;
    if (begins) read_rows(weights, warp, lane / 4, from / STEP, rows, scales);
    Batch& a = batches[from / BATCH % 2];
    multiplied<1>(), hold(a);
#pragma unroll
    for (int i = 0; i < BATCH / 32; ++i) {
      const uint2 q = words_of(shared(weights), warp, lane, from + 32 * i);
      u32 upper[4], lower[4];
      unpack(q.x, rows[0], upper), unpack(q.y, rows[1], lower);
#pragma unroll
      for (int j = 0; j < 4; ++j) a[2 * i + j / 2][j % 2 * 2] = upper[j], a[2 * i + j / 2][j % 2 * 2 + 1] = lower[j];
    }
    hold(a);
    if (EXACT) multiplied<0>(), hold(sums);
    if (from == (EXACT ? 0 : BATCH) && !first && lane == 0) arrive(before);
    if (EXACT && begins) {
      const float upper = unit(scales[0]), lower = unit(scales[1]);
      change_unit(sums, __fdividef(units[0], upper), __fdividef(units[1], lower));
      units[0] = upper, units[1] = lower;
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < BATCH / 16; ++i) {
      const int input = from + 16 * i;
      WGMMA(sums, a[i], operand(x + input / 64 * (N * 128) + input % 64 * 2));
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
}

#endif

// Sums of all programs of a cluster

INLINE u32 programs_of_cluster() {
  u32 found;
  asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(found));
  return found;
}
// Warps whose sums a program adds up, but that the last ones may have fewer
INLINE u32 share_of(u32 programs) { return (WARPS + programs - 1) / programs; }
// Sums that were sent: a barrier for each of these warps
INLINE void expect_sums(u64* sent) {
  const u32 all = programs_of_cluster(), own = blockIdx.x % all;
  for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
    prepare(shared(sent + chunk), 1);
    const bool has = chunk < share_of(all) && own * share_of(all) + chunk < WARPS;
    if (all > 1 && has) expect(shared(sent + chunk), (all - 1) * SENT_BYTES);
  }
}
INLINE u32 there(u32 at, u32 program) {             // the same place in another program of the cluster
  u32 found;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(at), "r"(program));
  return found;
}
// The sums of a warp, in the program that adds them up. False for the others, which send theirs.
INLINE bool together(float (&sums)[N / 2], char* arriving, u64* sent, int warp, int lane) {
  const u32 all = programs_of_cluster(), own = blockIdx.x % all;
  if (all == 1) return true;
  const u32 chunk = warp % share_of(all), owner = warp / share_of(all);
  char* held = arriving + chunk * (all - 1) * SENT_BYTES + lane * 16;
  // FEW: when all have begun, which they told in the beginning; others: when all have computed, since sums
  // take the place of what that was done with
#if !FEW
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (own != owner) {
    const u32 to = there(shared(held) + (own - (own > owner)) * SENT_BYTES, owner);
    const u32 barrier = there(shared(sent + chunk), owner);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
      asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];"
                   ::"r"(to + j * 512), "r"(__float_as_uint(sums[4 * j])), "r"(__float_as_uint(sums[4 * j + 1])),
                   "r"(__float_as_uint(sums[4 * j + 2])), "r"(__float_as_uint(sums[4 * j + 3])), "r"(barrier) : "memory");
    return false;
  }
  await(shared(sent + chunk), 0);
  for (u32 other = 0; other < all - 1; ++other)
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float4 found = *(const float4*)(held + other * SENT_BYTES + j * 512);
      float* four = sums + 4 * j;
      four[0] += found.x, four[1] += found.y, four[2] += found.z, four[3] += found.w;
    }
  return true;
}

#if FEW

// A warp's rows: a few numbers for each token
INLINE void write(float (&sums)[N / 2], unsigned short* out, const unsigned short* bias, int row, int token,
                  int tokens, int width, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + 8 * half + lane / 4;
    if (at >= width) return;
    const float more = !bias ? 0.0f : BFLOAT ? bfloat_number(bias[at]) : half_number(bias[at]);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int own = token + i / 2 * 8 + lane % 4 * 2 + i % 2;
      if (own < tokens)
        out[(u64)own * width + at] = (unsigned short)twice(sums[i / 2 * 4 + half * 2 + i % 2] + more);
    }
  }
}

#else

INLINE void read_bias(const unsigned short* bias, int row, int width, int lane, float (&more)[2]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const int at = row + 8 * w + lane / 4;
    more[w] = !bias || at >= width ? 0.0f : BFLOAT ? bfloat_number(bias[at]) : half_number(bias[at]);
  }
}
// A warpgroup's rows of N tokens: turned round in shared memory, so that what a token has of them, up to
// 128 bytes, is written at once. Warps whose sums another program has help with those of this one.
INLINE void write(float (&sums)[N / 2], const float (&more)[2], unsigned short* out, char* turned, u32& turn, int row,
                  int token, int tokens, int width, int warp, int lane) {
  const u32 all = programs_of_cluster(), own = blockIdx.x % all;
  const u32 first = own * share_of(all), last = first + share_of(all) - 1, group = warp / 4 * 4;
  if (last < group || first > group + 3) return;
  // four matrices of 8 rows and 8 tokens at a time: of two eights of tokens; eighths of 128 bytes are swizzled
  const int matrix = lane / 8, at = lane % 8 + matrix / 2 * 8, eighth = warp % 4 * 2 + matrix % 2;
  const int thread = warp % 4 * 32 + lane, own_token = thread / 8, own_eighth = thread % 8;
  const u32 to = at * 128 + (eighth ^ at % 8) * 16, from = own_token * 128 + (own_eighth ^ own_token % 8) * 16;
  const u32 column = row + own_eighth * 8, its = group + own_eighth / 2;
  const bool has = first <= warp && warp <= last, writes = column < width && first <= its && its <= last;
  auto turn_round = [&](int j, u32 half) {
    u32 r[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int w = m % 2, four = 4 * (j + m / 2) + w * 2;
      r[m] = pair(sums[four] + more[w], sums[four + 1] + more[w]);
    }
    if (has)
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                       shared(turned) + half * TURNED_BYTES + to), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
  };
  // who passes a barrier knows that the half which was turned round before has been read by all
  turn_round(0, turn & 1);
#pragma unroll
  for (int j = 0; j < N / 8; j += 2) {
    if (token + 8 * j >= tokens) break;
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
    const u32 half = turn++ & 1;
    if (j + 2 < N / 8) turn_round(j + 2, half ^ 1);
    const uint4 found = *(const uint4*)(turned + half * TURNED_BYTES + from);
    const int position = token + 8 * j + own_token;
    if (writes && position < tokens) *(uint4*)(out + (u64)position * width + column) = found;
  }
}

#endif

// first     cluster of this launch, of all that a product takes
// end       cluster behind its last one: a program that is a cluster of its own goes on to others
// tokens    rows of x, and of out [tokens, width]
// across    programs that have the same rows, and other tokens: clusters next to each other
// steps     inputs / 128
// repeated  steps that have the same scale: 1 but for groups wider than 128
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
product(const __grid_constant__ Map x, const char* __restrict__ words, const char* __restrict__ scale,
        const char* __restrict__ zero, const unsigned short* __restrict__ bias, unsigned short* __restrict__ out,
        u32 first, u32 end, int tokens, int width, u32 across, u32 steps, u32 repeated) {
  extern __shared__ __align__(1024) char memory[];
  __shared__ __align__(8) u64 full[STAGES], empty[STAGES];
  __shared__ __align__(8) u64 sent[CHUNKS];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (thread == 0) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("prefetch.tensormap [%0];" ::"l"(&x) : "memory");
    for (int i = 0; i < STAGES; ++i) prepare(shared(full + i), 1), prepare(shared(empty + i), WARPS);
    expect_sums(sent);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const u32 all = programs_of_cluster(), own = blockIdx.x % all, stride = gridDim.x / all;
  const u32 from = steps * own / all, to = steps * (own + 1) / all;
  u32 cluster = first + blockIdx.x / all, stage = 0, round = 0;
#if FEW
  if (all > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  if (warp >= WARPS) {                              // copies
#if !FEW
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPIES_WITH));
    if (warp > WARPS) return;
#endif
    if (lane) return;                               // one thread tells the copy engine
    const u32 groups = steps / repeated * (128 / STEP), ring = shared(memory) + STAGES * X_BYTES;
    const char *words_at, *scale_at, *zero_at;
    u32 left;                                       // steps until there is another scale
    auto begin = [&] {                              // a cluster
      const u64 block = cluster / across, group = block * groups + from / repeated * (128 / STEP);
      words_at = words + (block * steps + from) * WORDS_BYTES;
      scale_at = scale + group * (SCALE_BYTES / (128 / STEP));
      zero_at = zero + group * (2 * ROWS);
      left = repeated - from % repeated;
    };
    auto weights = [&](u32 stage) {                 // of a step, and on to the next one
      const u32 barrier = shared(full + stage), at = ring + stage * WEIGHT_BYTES;
      expect(barrier, X_BYTES + WEIGHT_BYTES);
      copy(at, words_at, WORDS_BYTES, barrier);
      copy(at + SCALE_AT, scale_at, SCALE_BYTES, barrier);
      if (ZEROS) copy(at + ZERO_AT, zero_at, ZERO_BYTES, barrier);
      words_at += WORDS_BYTES;
      if (--left == 0) scale_at += SCALE_BYTES, zero_at += ZERO_BYTES, left = repeated;
    };
    auto inputs = [&](u32 stage, u32 step) {
      copy_x(shared(memory) + stage * X_BYTES, &x, cluster % across * N, 2 * step, shared(full + stage));
    };
    begin();
    const u32 filled = min(STAGES, to - from);
    for (u32 i = 0; i < filled; ++i) weights(i);
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (u32 i = 0; i < filled; ++i) inputs(i, from + i);
    stage = filled % STAGES, round = filled / STAGES;
    for (u32 step = from + filled;; step = from, begin()) {
      for (; step < to; ++step) {
        if (round) await(shared(empty + stage), (round - 1) & 1);
        weights(stage), inputs(stage, step);
        if (++stage == STAGES) stage = 0, ++round;
      }
      if (RESIDENT > 1 || (cluster += stride) >= end) return;
    }
  }
#if !FEW
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COMPUTES_WITH));
  u32 turn = 0;
#endif
  do {
    const int row = cluster / across * ROWS, token = cluster % across * N;
    float sums[N / 2] = {};
#if FEW
    for (u32 step = from; step < to; ++step) {
      await(shared(full + stage), round & 1);
      compute(shared(memory) + stage * X_BYTES, memory + STAGES * X_BYTES + stage * WEIGHT_BYTES, warp, lane, sums);
      __syncwarp();
      if (lane == 0) arrive(shared(empty + stage));
      if (++stage == STAGES) stage = 0, ++round;
    }
    if (together(sums, memory + RING_BYTES, sent, warp, lane))
      write(sums, out, bias, row + warp * 16, token, tokens, width, lane);
#else
    float units[2] = {1.0f, 1.0f}, more[2];
    Batch batches[2] = {};
    auto before = [&] { return shared(empty + (stage ? stage : STAGES) - 1); };
    for (u32 step = from; step < to; ++step) {
      await(shared(full + stage), round & 1);
      if (step == from) read_bias(bias, row + warp * 16, width, lane, more);
      compute(shared(memory) + stage * X_BYTES, memory + STAGES * X_BYTES + stage * WEIGHT_BYTES, warp, lane, sums, units,
              batches, step == from, before());
      if (++stage == STAGES) stage = 0, ++round;
    }
    multiplied<0>(), hold(batches[0]), hold(batches[1]), hold(sums);
    if (lane == 0) arrive(before());
    if (EXACT) change_unit(sums, units[0], units[1]);
    together(sums, memory, sent, warp, lane);
    write(sums, more, out, memory + RING_BYTES + warp / 4 * (2 * TURNED_BYTES), turn, row + warp / 4 * 64, token, tokens,
          width, warp, lane);
#endif
  } while (RESIDENT == 1 && (cluster += stride) < end);
}
