// Crash kills llm-proxy repeatedly and compares its ledger with what clients saw.
//
//	go run ./bench/crash -loops 100
//
// It starts the real program (newly built, or -bin) on an empty data directory, with a scripted provider on loopback, under
// mixed load: unary calls and streams, provider errors, clients that disconnect, several tokens, one of them with
// max_requests. At a random moment it sends SIGKILL, starts the program again on the same directory, and checks:
//
//   - every call of which a client saw an answer byte has a row;
//   - no row is open after a start, and no row or count is lost;
//   - a call that was complete well before the kill is "ok" with exact usage;
//   - the provider received no more calls of the limited token than its
//     request_count says, and that is never more than max_requests;
//   - each token's request_count, and the sums, equal the rows;
//   - a start takes less than two seconds.
//
// It prints one line, and exits with 1 if a check failed. -seed repeats the same choices, but not the same timing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		os.Exit(1)
	}
}

// options are the command line flags.
type options struct {
	bin     string
	loops   int
	clients int
	seed    uint64
}

const slowestStart = 2 * time.Second

func run(ctx context.Context, args []string, out io.Writer) error {
	var o options
	flags := flag.NewFlagSet("crash", flag.ContinueOnError)
	flags.StringVar(&o.bin, "bin", "", "the program to kill; empty: build it")
	flags.IntVar(&o.loops, "loops", 20, "how often to kill it")
	flags.IntVar(&o.clients, "clients", 8, "clients at a time")
	flags.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "for the random choices")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "llm-proxy-crash-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.bin == "" {
		o.bin = filepath.Join(dir, "llm-proxy")
		if text, err := exec.CommandContext(ctx, "go", "build", "-o", o.bin, "llm-proxy").CombinedOutput(); err != nil {
			return fmt.Errorf("building the program: %w: %s", err, text)
		}
	}
	provider, err := startProvider()
	if err != nil {
		return err
	}
	defer provider.close()
	t := &trial{options: o, rng: rand.New(rand.NewPCG(o.seed, 1)), provider: provider, dir: filepath.Join(dir, "data"), rows: map[string]row{}}
	err = t.run(ctx)
	fmt.Fprintf(out, "crash: %d kills, %d calls seen, %d rows, %d of them lost, limited token %d of %d, slowest start %v, %d violations (seed %d)\n",
		t.kills, t.seen, len(t.rows), t.lost(), t.limited.count, t.limited.limit, t.slowest.Round(time.Millisecond), len(t.violations), o.seed)
	for i, v := range t.violations {
		if i == 20 {
			fmt.Fprintf(out, "  and %d more\n", len(t.violations)-i)
			break
		}
		fmt.Fprintln(out, "  "+v)
	}
	if err == nil && len(t.violations) > 0 {
		err = errors.New("the promises do not hold")
	}
	return err
}

// A trial is one run of the loop.
type trial struct {
	options
	rng      *rand.Rand
	provider *provider
	dir      string

	proxy      *proxy
	tokens     []*token
	limited    token // the last of tokens, as of the last check
	rows       map[string]row
	kills      int
	seen       int
	slowest    time.Duration
	violations []string
}

func (t *trial) violated(format string, args ...any) {
	t.violations = append(t.violations, fmt.Sprintf("kill %d: ", t.kills)+fmt.Sprintf(format, args...))
}

func (t *trial) lost() (n int) {
	for _, r := range t.rows {
		if r.Outcome == "lost" {
			n++
		}
	}
	return n
}

// run does all loops and then stops the program cleanly.
func (t *trial) run(ctx context.Context) error {
	if err := t.start(ctx); err != nil {
		return err
	}
	defer func() { t.proxy.kill() }()
	if err := t.makeTokens(); err != nil {
		return err
	}
	for range t.loops {
		began := time.Now()
		calls := t.load(ctx, time.Duration(200+t.rng.IntN(1400))*time.Millisecond)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := t.start(ctx); err != nil {
			return err
		}
		if err := t.check(began, calls); err != nil {
			return err
		}
	}
	began := time.Now()
	if err := t.proxy.stop(); err != nil {
		t.violated("SIGTERM: it ended with %v", err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.violated("SIGTERM: it took %v to end", d)
	}
	return nil
}

// start starts the program and records how long it took to become ready.
func (t *trial) start(ctx context.Context) error {
	began := time.Now()
	p, err := startProxy(ctx, t.bin, t.dir, t.provider.url)
	if err != nil {
		return err
	}
	t.proxy = p
	took := time.Since(began)
	t.slowest = max(t.slowest, took)
	if took > slowestStart {
		t.violated("the start took %v", took)
	}
	return nil
}
