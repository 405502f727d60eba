// This file makes the load, with connections that send one request after the other, and measures what it costs the target.
package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// uniquePlace in a request is replaced by another number for each call, clientPlace by another one for each connection.
const uniquePlace, clientPlace = "@@@@@@@@@@@@@@@@@@", "~~~~~~~~~~~~~~~~~~"

type measured struct {
	cpuPerCall float64 // microseconds
	p50, p99   float64 // microseconds
}

// load keeps w.conns connections busy with calls for d, after a warm-up of d/4. With a rate, calls are sent at fixed
// times instead, and latency counts from the time at which a call was due.
func load(ctx context.Context, t target, w workload, d time.Duration) (measured, error) {
	ctx, cancel := context.WithTimeout(ctx, d+d/4)
	defer cancel()
	begin := time.Now().Add(d / 4)
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	var cpu0 float64
	var wait sync.WaitGroup
	wait.Go(func() {
		time.Sleep(time.Until(begin))
		mu.Lock()
		defer mu.Unlock()
		cpu0 = cpuTime(t.pid)
	})
	for i := range w.conns {
		wait.Go(func() {
			mine, err := worker(ctx, t, w, begin, i)
			mu.Lock()
			defer mu.Unlock()
			took = append(took, mine...)
			if failed == nil {
				failed = err
			}
		})
	}
	wait.Wait()
	cpu := cpuTime(t.pid) - cpu0
	if failed != nil || len(took) == 0 {
		return measured{}, fmt.Errorf("load on %s: %d calls, %w", t.name, len(took), failed)
	}
	slices.Sort(took)
	at := func(share int) float64 { return float64(took[len(took)*share/100].Nanoseconds()) / 1e3 }
	return measured{cpuPerCall: cpu / float64(len(took)) * 1e6, p50: at(50), p99: at(99)}, nil
}

func worker(ctx context.Context, t target, w workload, begin time.Time, i int) ([]time.Duration, error) {
	conn, err := net.Dial("tcp", t.addr)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	br, request, streamed := bufio.NewReader(conn), t.request(w), strings.Contains(w.body, `"stream":true`)
	var took []time.Duration
	due := time.Now()
	var gap time.Duration
	if w.rate > 0 {
		gap = time.Second * time.Duration(w.conns) / time.Duration(w.rate)
		due = due.Add(gap * time.Duration(i) / time.Duration(w.conns))
	}
	request = bytes.ReplaceAll(request, []byte(clientPlace), fmt.Appendf(nil, "%0*x", len(clientPlace), i))
	at := bytes.Index(request, []byte(uniquePlace))
	for calls := 0; ctx.Err() == nil; calls++ {
		if at >= 0 {
			copy(request[at:], fmt.Sprintf("%0*x", len(uniquePlace), begin.UnixNano()/1e6<<28|int64(i)<<20|int64(calls)))
		}
		if w.rate > 0 {
			time.Sleep(time.Until(due))
		} else {
			due = time.Now()
		}
		if _, err := conn.Write(request); err != nil {
			return took, err
		}
		m, err := readMessage(br, false)
		if err != nil || !bytes.HasPrefix(m.head, []byte("HTTP/1.1 200 ")) || streamed && !bytes.HasSuffix(m.body, []byte("[DONE]\n\n")) {
			return took, fmt.Errorf("got %.60s %.200s: %w", m.head, m.body, err)
		}
		if due.After(begin) {
			took = append(took, time.Since(due))
		}
		due = due.Add(gap)
	}
	return took, nil
}

// idleStreams opens n streams that send one word and then nothing, and returns the KiB of memory that each costs the target.
func idleStreams(ctx context.Context, t target, n int) (float64, error) {
	before := rss(t.pid)
	request := t.request(workload{body: chatBody(`"stream":true,"user":"idle"`)})
	for range n {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", t.addr)
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		if _, err := conn.Write(request); err != nil {
			return 0, err
		}
		if line, err := bufio.NewReaderSize(conn, 64).ReadString('\n'); err != nil || !strings.Contains(line, "200") {
			return 0, fmt.Errorf("idle stream: %q %w", line, err)
		}
	}
	time.Sleep(time.Second)
	return (rss(t.pid) - before) / float64(n), nil
}

// cpuTime returns the seconds of CPU that the threads of a process have used.
func cpuTime(pid int) float64 {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid)) // in nanoseconds; stat counts in hundredths
	var sum float64
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		used, _, _ := strings.Cut(string(b), " ")
		nanos, _ := strconv.ParseFloat(used, 64)
		sum += nanos
	}
	return sum / 1e9
}

// rss returns the KiB of memory that a process holds.
func rss(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	v, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
	return v
}
